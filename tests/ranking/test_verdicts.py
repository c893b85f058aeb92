"""Leak, look, clear: what each asks of the intervals, and what is told."""

import pytest

from recray.ranking.verdicts import (
    BASELINE,
    CLEAR,
    DRAWN,
    LEAK,
    LISTED,
    LOOK,
    ORDERED,
    SUSPECT,
    Judged,
    Measured,
    best_baseline,
    judge,
    leaks,
    line,
)

CHANCE = 0.05
BASELINES = [Measured("popularity", BASELINE, 0.25, 0.2, 0.3), Measured("transitions", BASELINE, 0.50, 0.45, 0.55)]


def verdict(suspect: Measured, baselines: list[Measured] = BASELINES) -> Judged:
    return judge([*baselines, suspect], chance=CHANCE)[-1]


def suspect(value: float, low: float | None, high: float | None, **more: object) -> Measured:
    return Measured("nearest id", SUSPECT, value, low, high, ORDERED, "id", **more)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("low", "high", "lead_low", "expected"),
    [
        (0.56, 0.70, 0.1, LEAK),
        (0.56, 0.70, None, LEAK),  # above the best baseline's upper bound, whatever the difference
        (0.55, 0.70, None, LOOK),  # at the bound is not above it
        (0.50, 0.70, 0.01, LEAK),  # the bounds meet, but on the same rows it finds more
        (0.50, 0.70, 0.0, LOOK),
        (0.35, 0.45, -0.1, LOOK),  # above popularity only
        (0.051, 0.2, -0.4, LOOK),
        (0.05, 0.2, -0.4, CLEAR),  # chance is in the interval
        (0.0, 0.01, -0.5, CLEAR),
    ],
)
def test_a_suspect_is_judged_by_its_interval(low: float, high: float, lead_low: float | None, expected: str) -> None:
    assert verdict(suspect((low + high) / 2, low, high, lead_low=lead_low)).verdict == expected


def test_a_baseline_never_leaks() -> None:
    alone = judge([Measured("transitions", BASELINE, 0.99, 0.98, 1.0, lead_low=0.5)], chance=CHANCE)
    assert alone == [Judged(CLEAR, "", "")]


def test_chance_is_a_floor_where_behaviour_finds_nothing() -> None:
    nothing = [Measured("popularity", BASELINE, 0.0, 0.0, 0.0)]
    assert verdict(suspect(0.06, 0.04, 0.08, lead_low=0.04), nothing).verdict == CLEAR
    assert verdict(suspect(0.10, 0.08, 0.12, lead_low=0.08), nothing).verdict == LEAK


def test_without_an_interval_nothing_leaks_but_what_is_above_chance_is_to_be_looked_at() -> None:
    found = verdict(suspect(0.9, None, None))
    assert found.verdict == LOOK
    assert "too few users" in found.reason
    assert verdict(suspect(0.05, None, None)).verdict == CLEAR


def test_the_best_baseline_is_the_one_that_finds_most() -> None:
    best = best_baseline([*BASELINES, suspect(0.9, 0.8, 1.0)])
    assert best is not None
    assert best.rule == "transitions"
    assert best_baseline([suspect(0.9, 0.8, 1.0)]) is None


@pytest.mark.parametrize(
    ("family", "words"),
    [(ORDERED, ["sorted by id", "time_cut"]), (LISTED, ["--fresh-candidates"]), (DRAWN, ["drawn here"])],
)
def test_a_leak_says_why_and_what_to_do(family: str, words: list[str]) -> None:
    found = verdict(Measured("a rule", SUSPECT, 0.9, 0.8, 1.0, family, "id"))
    assert found.verdict == LEAK
    assert "transitions (0.500)" in found.reason
    assert all(word in found.advice for word in words)


def test_leaks_come_strongest_first_and_lines_hold_the_numbers() -> None:
    rules = [
        {"rule": name, "verdict": said, "value": value, "low": low, "high": 0.99, "chance": CHANCE}
        for name, said, value, low in (("a", LEAK, 0.6, 0.5), ("b", LOOK, 0.2, None), ("c", LEAK, 0.9, 0.8))
    ]
    assert [rule["rule"] for rule in leaks(rules)] == ["c", "a"]
    assert line(rules[0]).split() == ["leak", "a", "HR@1", "0.600", "[0.500,", "0.990]", "(chance", "0.050)"]
    assert "[" not in line(rules[1])
