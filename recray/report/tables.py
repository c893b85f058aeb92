"""The results as a table in the terminal, and how numbers are written wherever they are shown."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table

NAMES = {
    "popularity": "Popularity",
    "cooccurrence": "Co-occurrence",
    "sasrec": "SASRec",
    "sft": "SFT",
    "aligned": "Aligned",
    "start": "SFT, the start",
}

Entry = Mapping[str, Any]  # one object of metrics.json, differences.json or slices.json


def model_name(model: str) -> str:
    """Return the name a model is shown by."""
    return NAMES.get(model, model)


def measure_name(measure: str) -> str:
    """Return the name a measure is shown by: `ndcg@10` is NDCG@10."""
    stem, at, k = measure.partition("@")
    known = {
        "hr": "HR",
        "ndcg": "NDCG",
        "mrr": "MRR",
        "average_popularity": "Popularity",
        "coverage": "Coverage",
        "gini": "Gini",
    }
    return known.get(stem, stem.replace("_", " ")) + at + k


def rank_measures(entries: Sequence[Entry]) -> list[str]:
    """Return the ranking measures that all entries have: HR by rising k, NDCG by rising k, MRR."""
    kinds = ("hr", "ndcg", "mrr")
    names = [name for name in (entries[0] if entries else {}) if name.partition("@")[0] in kinds]
    shared = [name for name in names if all(name in entry for entry in entries)]
    return sorted(shared, key=lambda name: (kinds.index(name.partition("@")[0]), int(name.partition("@")[2] or 0)))


def in_order(models: Iterable[str]) -> list[str]:
    """Return models in the order in which they are shown everywhere: known ones as in `NAMES`, then the others."""
    known = list(NAMES)
    return sorted(models, key=lambda model: known.index(model) if model in known else len(known))


def headline_measure(entries: Sequence[Entry]) -> str | None:
    """Return NDCG@10, else the NDCG nearest to it; None if there is none."""
    found = [name for name in rank_measures(entries) if name.startswith("ndcg@")]
    return min(found, key=lambda name: abs(int(name.partition("@")[2]) - 10), default=None)


def results_table(metrics: Sequence[Entry], *, confidence: float) -> Table:
    """Return models by measures, each value with half the width of its interval.

    Args:
        metrics: `evaluate/metrics.json`.
        confidence: of the intervals, for the caption.
    """
    table = _table("Test ranking", _caption(metrics, confidence))
    shown = _few(metrics)
    table.add_column("model", no_wrap=True)
    for name in (*shown, "average_popularity", "coverage"):
        table.add_column(measure_name(name).lower() if name in _EXPOSURE else measure_name(name), justify="right")
    for entry in metrics:
        values = [with_margin(entry[name]) for name in shown]
        popularity, reach = entry.get("average_popularity"), entry.get("coverage")
        values += ["–" if popularity is None else plain(popularity["value"], 0)]
        values += ["–" if reach is None else f"{100 * reach:.1f} %"]
        table.add_row(model_name(entry["model"]), *values)
    return table


def differences_table(differences: Sequence[Entry], *, confidence: float) -> Table:
    """Return pairs of models by measures: first minus second on the same rows, with its interval."""
    table = _table("Paired differences", f"on the same rows; {100 * confidence:g} % intervals, clustered by user")
    shown = _few(differences)
    table.add_column("pair", no_wrap=True)
    for name in shown:
        table.add_column(measure_name(name), justify="right")
    tested = next((entry["test"] for entry in differences if "test" in entry), None)
    if tested is not None:
        table.add_column(f"p (Holm)\n{measure_name(tested['measure'])}", justify="right")
    for entry in differences:
        pair = f"{model_name(entry['model'])} − {model_name(entry['minus'])}"
        p_values = [] if tested is None else [p_value(entry.get("test", {}).get("p_holm"))]
        table.add_row(pair, *(signed_with_interval(entry[name]) for name in shown), *p_values)
    return table


def slices_table(slices: Sequence[Entry], *, confidence: float) -> Table:
    """Return slices by models: the headline measure with half the width of its interval.

    Args:
        slices: `evaluate/slices.json`.
        confidence: of the intervals, for the caption.
    """
    measure = slice_measure(slices)
    models = in_order(slices[0]["models"]) if slices else []
    name = "" if measure is None else f"{measure_name(measure)}; "
    table = _table("By part of the test rows", f"{name}± half the {100 * confidence:g} % interval, clustered by user")
    table.add_column("part")
    table.add_column("rows", justify="right")
    for model in models:
        table.add_column(model_name(model), justify="right")
    for part in slices if measure is not None else ():
        values = (with_margin(part["models"][model][measure]).replace(" ", "\n") for model in models)
        table.add_row(f"{part['by']}: {part['slice']}", f"{part['rows']:,}", *values)
    return table


def slice_measure(slices: Sequence[Entry]) -> str | None:
    """Return the measure by which slices are shown; None without any."""
    return headline_measure(list(slices[0]["models"].values())) if slices else None


def plain(value: float | None, digits: int = 3) -> str:
    """Return a number with a fixed count of digits, thousands grouped; an en dash for what is not known."""
    if value is None or not math.isfinite(value):
        return "–"
    return f"{value:,.{digits}f}"


def p_value(value: float | None) -> str:
    """Return a p-value with three digits, those below as such; an en dash for what is not known."""
    return "< 0.001" if value is not None and value < 0.001 else plain(value)


def signed(value: float | None, digits: int = 3) -> str:
    """Return a number with its sign, a true minus."""
    return "–" if value is None else f"{value:+.{digits}f}".replace("-", "−")


def with_margin(interval: Mapping[str, float | None], digits: int = 3) -> str:
    """Return `0.512 ±0.010`: the value and half the width of its interval."""
    low, high = interval["low"], interval["high"]
    if low is None or high is None:
        return plain(interval["value"], digits)
    return f"{plain(interval['value'], digits)} ±{plain((high - low) / 2, digits)}"


def signed_with_interval(interval: Mapping[str, float | None], digits: int = 3) -> str:
    """Return `+0.012` and, on a line of its own, `[+0.002, +0.022]`."""
    low, high = interval["low"], interval["high"]
    bounds = "" if low is None or high is None else f"\n[{signed(low, digits)}, {signed(high, digits)}]"
    return signed(interval["value"], digits) + bounds


_EXPOSURE = ("average_popularity", "coverage")


def _few(entries: Sequence[Entry]) -> list[str]:
    """Return as many ranking measures as eighty columns hold: first HR, the two at 10, MRR."""
    names = rank_measures(entries)
    hit_rates = [name for name in names if name.startswith("hr@")]
    headline = headline_measure(entries)
    wanted = [*hit_rates[:1], *([headline] if headline else []), "mrr"]
    return [name for name in _unique(wanted) if name in names]


def _unique(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))


def _caption(metrics: Sequence[Entry], confidence: float) -> str:
    if not metrics:
        return ""
    rows, users = metrics[0]["rows"], metrics[0]["users"]
    return (
        f"{rows:,} rows of {users:,} users; ± half the {100 * confidence:g} % interval, clustered by user; "
        "popularity and coverage of the first item shown"
    )


def _table(title: str, caption: str) -> Table:
    """Return an empty table that keeps to eighty columns: a submitted job has no wider terminal."""
    return Table(
        title=title,
        caption=caption,
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        collapse_padding=True,
        title_justify="left",
        caption_justify="left",
    )
