"""Methods side by side: one HTML page that stands alone, from plain data."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup

from recray.report import plots
from recray.report.findings import findings
from recray.report.page import templates
from recray.report.tables import Entry, headline_measure, plain, rank_measures

START = "start"  # the model that all runs began from, beside them


@dataclass(frozen=True)
class Comparison:
    """All that the page shows."""

    name: str
    metrics: Sequence[Entry]  # `compare/metrics.json`: baselines, the start, then one a method
    differences: Sequence[Entry]  # `compare/differences.json`
    runs: Sequence[Mapping[str, Any]]  # `compare/runs.json`
    watched: str = "ndcg@10"  # on validation
    confidence: float = 0.95


def render_comparison(contents: Comparison) -> str:
    """Return the page; nothing on it is loaded from elsewhere."""
    methods, models = _methods(contents.runs), [entry["model"] for entry in contents.metrics]
    pictures = {
        "seconds": plots.paths_picture(paths(contents.runs, "seconds"), "seconds of steps", contents.watched),
        "steps": plots.paths_picture(paths(contents.runs, "step"), "steps", contents.watched),
        "popularity": plots.popularity_picture(contents.metrics, None),
    }
    unknown = {"steps": None, "seconds": None}
    return (
        templates()
        .get_template("comparison.html")
        .render(
            contents=contents,
            lead=_lead(contents),
            judged=headline_measure(contents.metrics),
            measures=rank_measures(contents.metrics),
            findings=findings(contents.differences, confidence=contents.confidence),
            colours={model: f"var(--{plots.method_colour(model, methods)})" for model in models},
            costs={model: cost(contents.runs, model) or unknown for model in models},
            runs=contents.runs,
            pictures={name: None if svg is None else Markup(svg) for name, svg in pictures.items()},  # noqa: S704 - our own
        )
    )


def cost(runs: Sequence[Mapping[str, Any]], method: str) -> dict[str, float] | None:
    """Return mean steps and seconds of a method's runs; None where it has none."""
    own = [run for run in runs if run["method"] == method]
    return {key: float(np.mean([run[key] for run in own])) for key in ("steps", "seconds")} if own else None


def paths(runs: Sequence[Mapping[str, Any]], over: str) -> dict[str, tuple[list[float], list[float]]]:
    """Return validation quality over `step` or `seconds` of each method, the mean over its runs point by point.

    Runs of a method are validated at the same steps; where one stopped earlier, by the clock, the mean ends with it.
    """
    found = {}
    for method in _methods(runs):
        curves = [run["curve"] for run in runs if run["method"] == method]
        shortest = min(len(curve) for curve in curves)
        points = [[(point[over], point["value"]) for point in curve[:shortest]] for curve in curves]
        x, y = np.mean(points, axis=0).T.tolist() if shortest else ([], [])
        found[method] = (x, y)
    return found


def _methods(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(run["method"] for run in runs))


def _lead(contents: Comparison) -> str:
    """Return what came out, in one sentence."""
    found = findings(contents.differences, confidence=contents.confidence)
    better = [each.pair.split(" − ")[0] for each in found if each.verdict == "better"]
    worse = [each.pair.split(" − ")[0] for each in found if each.verdict == "worse"]
    rest = len(found) - len(better) - len(worse)
    start = next((entry for entry in contents.metrics if entry["model"] == START), None)
    judged = headline_measure(contents.metrics)
    at = "" if start is None or judged is None else f" ({judged.upper()} {plain(start[judged]['value'])})"
    parts = [f"{', '.join(better)} better" if better else "", f"{', '.join(worse)} worse" if worse else ""]
    parts += [f"{rest} of {len(found)} can’t be told from it" if rest else ""]
    return f"Against the SFT model{at}: {'; '.join(part for part in parts if part) or 'nothing was compared'}."
