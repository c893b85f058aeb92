"""What came out, in sentences: each difference with its interval, and whether it is more than chance explains."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from recray.ranking.slices import COLD
from recray.ranking.verdicts import BASELINE, leaks
from recray.report.tables import (
    Entry,
    headline_measure,
    in_order,
    measure_name,
    model_name,
    plain,
    signed,
    slice_measure,
)


class Finding(NamedTuple):
    """One paired difference, judged."""

    pair: str
    measure: str
    interval: Mapping[str, float | None]
    verdict: str
    p: float | None = None  # of the permutation test
    p_holm: float | None = None  # corrected for all comparisons shown


WORDS = {1: "better", -1: "worse", 0: "can’t be told apart", None: "too few users to say"}


def verdict(interval: Mapping[str, float | None]) -> int | None:
    """Return 1 if the whole interval lies above zero, -1 if below, 0 if it holds zero, None if it is not known."""
    low, high = interval["low"], interval["high"]
    if low is None or high is None:
        return None
    return int(low > 0) - int(high < 0)


def findings(differences: Sequence[Entry], *, confidence: float = 0.95) -> list[Finding]:
    """Return every pair's difference in the headline measure, judged; none where there is no such measure.

    Better or worse needs both: the whole interval on one side, and a p-value that stands the correction for all pairs.
    """
    measure = headline_measure(differences)
    if measure is None:
        return []
    found = []
    for entry in differences:
        test = entry.get("test", {})
        p, p_holm = (test.get(name) if test.get("measure") == measure else None for name in ("p", "p_holm"))
        pair = f"{model_name(entry['model'])} − {model_name(entry['minus'])}"
        words = WORDS[verdict(entry[measure])] + doubt(entry, measure, confidence)
        found.append(Finding(pair, measure, entry[measure], words, p, p_holm))
    return found


def doubt(entry: Entry, measure: str, confidence: float) -> str:
    """Return what to add to a better or worse that does not stand the correction for all pairs; else nothing."""
    test = entry.get("test", {})
    p_holm = test.get("p_holm") if test.get("measure") == measure else None
    if verdict(entry[measure]) and p_holm is not None and p_holm > 1 - confidence:
        return f", but not beyond chance among {test['comparisons']} comparisons"
    return ""


def summary(metrics: Sequence[Entry], differences: Sequence[Entry], *, confidence: float) -> list[str]:
    """Return the sentences that open the report, from what numbers there are.

    Args:
        metrics: `evaluate/metrics.json`.
        differences: `evaluate/differences.json`.
        confidence: of the intervals.
    """
    measure = headline_measure(metrics)
    if measure is None:
        return ["There are no ranking results yet, so there is nothing to conclude."]
    by_model = {entry["model"]: entry for entry in metrics}
    paired = {(entry["model"], entry["minus"]): entry for entry in differences}
    sentences = []
    for first, second in (("aligned", "sft"), ("sft", "popularity"), ("sft", "cooccurrence")):
        if (first, second) in paired and {first, second} <= by_model.keys():
            entry = paired[first, second]
            values = by_model[first][measure]["value"], by_model[second][measure]["value"]
            said = _comparison(first, second, measure, values, entry[measure])
            sentences.append(f"{said}{doubt(entry, measure, confidence)}.")
    sentences += _popularity_shift(by_model)
    sentences.append(
        f"Measured on {metrics[0]['rows']:,} held-out rows of {metrics[0]['users']:,} users, every model ranking "
        f"the same candidates; in brackets the {100 * confidence:g} % interval of the difference, clustered by user."
    )
    return sentences


def cold_sentence(slices: Sequence[Entry]) -> str:
    """Return how many targets training never had, and what each model gets there; empty without slices.

    Args:
        slices: `evaluate/slices.json`.
    """
    measure = slice_measure(slices)
    if measure is None:
        return ""
    cold = next((part for part in slices if part["slice"] == COLD), None)
    if cold is None:
        return "Every target was met in training."
    found = cold["models"]
    got = ", ".join(f"{model_name(model)} {plain(found[model][measure]['value'])}" for model in in_order(found))
    return (
        f"On targets never met in training: {cold['rows']:,} of {cold['of']:,} rows, where {measure_name(measure)} is "
        f"{got}. A model that only counts knows nothing of them."
    )


def audit_sentence(rules: Sequence[Mapping[str, Any]]) -> str:
    """Return what the audit comes to, in a sentence; the leaks themselves are told one by one.

    Args:
        rules: rows of `schema.AUDIT`.
    """
    if not rules:
        return "The evaluation has not been audited."
    best = max((rule for rule in rules if rule["kind"] == BASELINE), key=lambda rule: rule["value"])
    beside = (
        f"of behaviour alone, {best['rule']} finds most: HR@1 {plain(best['value'])} (chance {plain(best['chance'])})"
    )
    number = len(leaks(rules))
    if number == 0:
        return f"No rule without learning finds more than behaviour explains; {beside}."
    told = "A rule without learning finds" if number == 1 else f"{number} rules without learning find"
    return f"{told} more than behaviour explains, so results on these rows are not about people; {beside}."


def _comparison(
    first: str, second: str, measure: str, values: tuple[float, float], difference: Mapping[str, Any]
) -> str:
    name, other = _in_a_sentence(first), _in_a_sentence(second)
    start = name[:1].upper() + name[1:]
    numbers = f"{measure_name(measure)} {plain(values[0])} against {plain(values[1])}"
    change = f"{signed(difference['value'])} ({signed(difference['low'])} to {signed(difference['high'])})"
    judged = verdict(difference)
    if judged is None:
        return f"{start} and {other}: {numbers}, {signed(difference['value'])}; too few users for an interval"
    if judged == 0:
        return f"{start} can’t be told from {other}: {numbers}, a difference of {change} whose interval holds zero"
    word = "better" if judged > 0 else "worse"
    return f"{start} ranks {word} than {other}, by more than the interval: {numbers}, {change}"


def _popularity_shift(by_model: Mapping[str, Entry]) -> list[str]:
    if not {"sft", "aligned"} <= by_model.keys():
        return []
    before, after = (by_model[model].get("average_popularity") for model in ("sft", "aligned"))
    if before is None or after is None:
        return []
    return [
        f"What the aligned model shows first has {plain(after['value'], 1)} training interactions on average; "
        f"before alignment it was {plain(before['value'], 1)}."
    ]


def _in_a_sentence(model: str) -> str:
    known = {
        "aligned": "the aligned model",
        "sft": "the SFT model",
        "popularity": "popularity",
        "cooccurrence": "co-occurrence",
    }
    return known.get(model, model_name(model))
