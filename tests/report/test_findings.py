"""The report's sentences say what the intervals say, and no more."""

import pytest

from recray.report.findings import audit_sentence, cold_sentence, findings, summary, verdict


def _interval(value: float, low: float | None, high: float | None) -> dict[str, float | None]:
    return {"value": value, "low": low, "high": high}


def _entry(model: str, value: float) -> dict[str, object]:
    return {"model": model, "rows": 1000, "users": 50, "ndcg@10": _interval(value, value - 0.1, value + 0.1)}


def _pair(low: float | None, high: float | None, first: str = "aligned", second: str = "sft") -> dict[str, object]:
    return {"model": first, "minus": second, "ndcg@10": _interval(0.01, low, high)}


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0.01, 0.02, 1), (-0.02, -0.01, -1), (-0.01, 0.02, 0), (0.0, 0.02, 0), (-0.02, 0.0, 0), (None, None, None)],
)
def test_verdict_needs_the_whole_interval(low: float | None, high: float | None, expected: int | None) -> None:
    assert verdict(_interval(0.0, low, high)) == expected


@pytest.mark.parametrize(
    ("low", "high", "words"),
    [
        (0.01, 0.02, "The aligned model ranks better than the SFT model, by more than the interval"),
        (-0.02, -0.01, "The aligned model ranks worse than the SFT model, by more than the interval"),
        (-0.01, 0.02, "The aligned model can’t be told from the SFT model"),
        (None, None, "too few users"),
    ],
)
def test_the_first_sentence_is_the_judgement(low: float | None, high: float | None, words: str) -> None:
    metrics = [_entry("sft", 0.50), _entry("aligned", 0.51)]
    first = summary(metrics, [_pair(low, high)], confidence=0.95)[0]
    assert words in first
    assert "NDCG@10 0.510 against 0.500" in first


def test_summary_without_evaluation_or_pairs() -> None:
    assert "no ranking results" in summary([], [], confidence=0.95)[0]
    (only,) = summary([_entry("sft", 0.5)], [], confidence=0.9)
    assert "1,000 held-out rows of 50 users" in only
    assert "90 %" in only


def test_cold_targets_are_told_even_if_there_are_none() -> None:
    part = {"by": "target in training", "slice": "met", "rows": 7, "of": 9, "users": 3, "models": {"sft": _pair(0, 0)}}
    assert cold_sentence([]) == ""
    assert cold_sentence([part]) == "Every target was met in training."
    told = cold_sentence([part, part | {"slice": "never met", "rows": 2}])
    assert told.startswith("On targets never met in training: 2 of 9 rows, where NDCG@10 is SFT 0.010.")


def test_popularity_shift_is_told() -> None:
    metrics = [_entry("sft", 0.5) | {"average_popularity": _interval(80.0, 70.0, 90.0)}]
    metrics += [_entry("aligned", 0.5) | {"average_popularity": _interval(60.0, 50.0, 70.0)}]
    assert any("60.0 training interactions" in sentence for sentence in summary(metrics, [], confidence=0.95))


def test_findings_judge_every_pair() -> None:
    pairs = [_pair(0.01, 0.02), _pair(-0.02, -0.01, "sft", "popularity"), _pair(-1.0, 1.0), _pair(None, None)]
    assert [finding.verdict for finding in findings(pairs)] == [
        "better",
        "worse",
        "can’t be told apart",
        "too few users to say",
    ]
    assert findings(pairs)[1].pair == "SFT − Popularity"
    assert findings([{"model": "a", "minus": "b", "mrr": _interval(0, 0, 0)}]) == []


def test_a_finding_must_stand_the_correction() -> None:
    test = {"measure": "ndcg@10", "comparisons": 8, "flips": 9999, "p": 0.02, "p_holm": 0.16}
    weak, strong = findings(
        [_pair(0.01, 0.02) | {"test": test}, _pair(-0.02, -0.01) | {"test": test | {"p_holm": 0.04}}], confidence=0.95
    )
    assert weak.verdict == "better, but not beyond chance among 8 comparisons"
    metrics = [_entry("sft", 0.50), _entry("aligned", 0.51)]
    opening = summary(metrics, [_pair(0.01, 0.02) | {"test": test}], confidence=0.95)[0]
    assert opening.endswith("but not beyond chance among 8 comparisons.")
    assert (weak.p, weak.p_holm) == (0.02, 0.16)
    assert strong.verdict == "worse"
    (loose,) = findings([_pair(0.01, 0.02) | {"test": test}], confidence=0.8)
    assert loose.verdict == "better"
    (other,) = findings([_pair(0.01, 0.02) | {"test": test | {"measure": "mrr"}}])
    assert (other.verdict, other.p_holm) == ("better", None)


def _rule(name: str, kind: str, value: float, verdict: str) -> dict[str, object]:
    return {"rule": name, "kind": kind, "value": value, "chance": 0.05, "verdict": verdict}


def test_the_audit_in_a_sentence() -> None:
    baselines = [_rule("popularity", "baseline", 0.2, "clear"), _rule("transitions", "baseline", 0.4, "clear")]
    assert "not been audited" in audit_sentence([])
    clear = audit_sentence([*baselines, _rule("nearest id", "suspect", 0.3, "look")])
    assert clear.startswith("No rule without learning")
    assert "transitions finds most: HR@1 0.400 (chance 0.050)" in clear
    one = audit_sentence([*baselines, _rule("list overlap", "suspect", 0.9, "leak")])
    assert one.startswith("A rule without learning finds more")
    two = [_rule("list overlap", "suspect", 0.9, "leak"), _rule("nearest id", "suspect", 0.6, "leak")]
    assert audit_sentence([*baselines, *two]).startswith("2 rules without learning find more")
