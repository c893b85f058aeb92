"""What the score of a rule without learning says about an evaluation: leak, look or clear, why, and what to do.

    leak   a suspect whose interval lies above that of the best behavioural baseline
    look   a suspect above chance, but no better than behaviour explains
    clear  neither

A baseline is behaviour, so it never leaks. Values are shares of rows in which the target is found first (HR@1). All
rules score the same rows, so "above" is also asked of the interval of the paired difference: where rows are sorted, the
baselines live on the order, too, and a few large users make both intervals wide together.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

BASELINE, SUSPECT = "baseline", "suspect"
LEAK, LOOK, CLEAR = "leak", "look", "clear"

ORDERED, LISTED, DRAWN = "ordered", "listed", "drawn"  # by an order; by published lists; by lists drawn here
ADVICE = {
    ORDERED: {
        LEAK: "The rows are sorted by {what}, not in the order in which things happened. Take another split: by time "
        "(sequences.split=time_cut) if the log has timestamps. Results on this one are not about people.",
        LOOK: "{What} carries some of the order. Never feed it to a model as a number or text.",
    },
    LISTED: {
        LEAK: "The candidate lists give the target away. Draw them afresh: --fresh-candidates.",
        LOOK: "The candidate lists hint at the target. Compare with candidates drawn afresh: --fresh-candidates.",
    },
    DRAWN: {
        LEAK: "The candidates were drawn here, uniformly, so behaviour should find more: see whether training holds "
        "enough to count, and compare with another --seed.",
        LOOK: "Targets are popular and drawn candidates are not: expected.",
    },
}


class Measured(NamedTuple):
    """What one rule scored."""

    rule: str
    kind: str  # BASELINE or SUSPECT
    value: float
    low: float | None  # None where too few users leave the interval unknown
    high: float | None
    family: str = ""  # of a suspect: ORDERED, LISTED or DRAWN
    what: str = ""  # by which ORDERED ones are
    lead_low: float | None = None  # lower bound of what it finds more than the best baseline, on the same rows


class Judged(NamedTuple):
    """A verdict with its reason and what to do about it."""

    verdict: str
    reason: str
    advice: str


def judge(measured: Sequence[Measured], *, chance: float) -> list[Judged]:
    """Return a verdict a rule.

    Args:
        measured: Baselines and suspects, on the same rows.
        chance: HR@1 of drawing one candidate at random.
    """
    best = best_baseline(measured)
    return [_verdict(each, best, chance) for each in measured]


def best_baseline(measured: Sequence[Measured]) -> Measured | None:
    """Return the baseline that finds most; None without baselines."""
    baselines = [each for each in measured if each.kind == BASELINE]
    return max(baselines, key=lambda each: each.value, default=None)


def leaks(rules: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return those rows of `schema.AUDIT` that are leaks, the strongest first."""
    return sorted((each for each in rules if each["verdict"] == LEAK), key=lambda each: -each["value"])


def line(rule: Mapping[str, Any]) -> str:
    """Return one row of `schema.AUDIT` as a line of text."""
    bounds = "" if rule["low"] is None else f" [{rule['low']:.3f}, {rule['high']:.3f}]"
    numbers = f"HR@1 {rule['value']:.3f}{bounds}  (chance {rule['chance']:.3f})"
    return f"{rule['verdict']:<5}  {rule['rule']:<32}  {numbers}"


def _verdict(each: Measured, best: Measured | None, chance: float) -> Judged:
    if each.kind == BASELINE:
        return Judged(CLEAR, "", "")
    if each.low is None or each.high is None:
        if each.value <= chance:
            return Judged(CLEAR, "", "")
        reason = f"above chance ({chance:.3f}), but of too few users for an interval"
        return Judged(LOOK, reason, _advice(each, LOOK))
    if each.low > chance and _is_above(each, best):
        beside = "chance" if best is None else f"{best.rule} ({best.value:.3f}), the best that behaviour alone does"
        return Judged(LEAK, f"It knows nothing about people and finds more than {beside}.", _advice(each, LEAK))
    if each.low > chance:
        return Judged(LOOK, f"above chance ({chance:.3f}), not above behaviour", _advice(each, LOOK))
    return Judged(CLEAR, "", "")


def _is_above(each: Measured, best: Measured | None) -> bool:
    """Return whether a suspect, whose bounds are known, finds more than the best baseline."""
    if best is None or best.high is None:
        return True
    return (each.low or 0.0) > best.high or (each.lead_low or 0.0) > 0


def _advice(each: Measured, verdict: str) -> str:
    what = each.what or each.rule
    return ADVICE[each.family][verdict].format(what=what, What=what[:1].upper() + what[1:])
