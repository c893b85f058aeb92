"""How varied what is shown is, and how near to the genres that people had met: the rows of a table."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from recray.report.tables import Entry


class Variety(NamedTuple):
    """One model's row; what is not known is None."""

    model: str
    div_ratios: list[float | None]  # one a k
    gaps: list[tuple[float | None, float | None]]  # (MGU, DGU), one a k
    too_much: tuple[str, float] | None  # the genre that is shown most above its share of the histories, and by how much
    too_little: tuple[str, float] | None


def shown_ks(metrics: Sequence[Entry], genres: Mapping[str, Any] | None) -> list[int]:
    """Return the k at which variety is shown: those of the genres, else the first item and the largest k up to 10."""
    if genres is not None:
        return sorted({each["k"] for of_model in genres["models"].values() for each in of_model})
    found = {1 if name == "div_ratio" else int(name.partition("@")[2]) for name in _div_ratios(metrics)}
    return sorted(found & {1, max((k for k in found if k <= 10), default=1)})


def varieties(metrics: Sequence[Entry], genres: Mapping[str, Any] | None) -> list[Variety]:
    """Return one row a model, and one of what people chose where genres are known; none without the numbers.

    Args:
        metrics: `evaluate/metrics.json`.
        genres: `genres` of `evaluate/exposure.json`; None where the catalogue has none.
    """
    ks = shown_ks(metrics, genres)
    if not _div_ratios(metrics):
        return []
    rows = []
    for entry in metrics:
        ratios = [entry.get("div_ratio" if k == 1 else f"div_ratio@{k}") for k in ks]
        by_k = {} if genres is None else {each["k"]: each for each in genres["models"].get(entry["model"], [])}
        rows.append(_variety(entry["model"], ratios, [by_k.get(k) for k in ks], genres))
    if genres is not None:
        chosen = [genres["chosen"] if k == 1 else None for k in ks]
        rows.append(_variety("What people chose", [None] * len(ks), chosen, genres))
    return rows


def _div_ratios(metrics: Sequence[Entry]) -> list[str]:
    return [name for name in (metrics[0] if metrics else {}) if name.partition("@")[0] == "div_ratio"]


def _variety(
    model: str,
    ratios: list[float | None],
    shown: list[Mapping[str, Any] | None],
    genres: Mapping[str, Any] | None,
) -> Variety:
    gaps = [(None, None) if each is None else (each["mgu"], each["dgu"]) for each in shown]
    last = next((each for each in reversed(shown) if each is not None and each["mgu"] is not None), None)
    if genres is None or last is None:
        return Variety(model, ratios, gaps, None, None)
    apart = [own - met for own, met in zip(last["shares"], genres["met"]["shares"], strict=True)]
    by_gap = sorted(zip(genres["genres"], apart, strict=True), key=lambda each: each[1])
    return Variety(model, ratios, gaps, by_gap[-1], by_gap[0])
