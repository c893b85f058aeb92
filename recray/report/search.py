"""A search on one HTML page that stands alone, from plain data: its points, what settings explain, the front."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import matplotlib
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from recray.ranking.importance import Importance
from recray.report import plots
from recray.report.page import templates
from recray.report.tables import measure_name, plain

RANKING, POPULARITY, START = "ndcg@10", "popularity@10", "start"
NOTHING_GAINED = "No point is better than the model they all start from."
BEST, FRONT, OTHER = plots.MODELS["aligned"], plots.SERIES[1], plots.MUTED

Points = Sequence[Mapping[str, Any]]  # `tune/points.json`, the best first


@dataclass(frozen=True)
class Found:
    """All that the page shows."""

    name: str
    points: Points
    ranges: Mapping[str, Mapping[str, Sequence[Any]]]  # of each setting, as it is written in the configuration
    explained: Mapping[str, Mapping[str, Importance]] = field(default_factory=dict)  # by goal and setting
    steps: int = 0  # of a whole run
    search: str = "optuna"


def render_search(contents: Found) -> str:
    """Return the page; nothing on it is loaded from elsewhere."""
    judged = [point for point in contents.points if point[RANKING] is not None]
    pictures = {"front": front_picture(judged), "parallel": parallel_picture(judged, contents.ranges)}
    return (
        templates()
        .get_template("search.html")
        .render(
            contents=contents,
            lead=_lead(contents.points),
            settings={name: short_name(name) for name in contents.ranges},
            goals=[goal for goal in (RANKING, POPULARITY) if contents.explained.get(goal)],
            value=value_text,
            became=became,
            range_text=range_text,
            pictures={name: None if svg is None else Markup(svg) for name, svg in pictures.items()},  # noqa: S704 - our own
        )
    )


def short_name(setting: str) -> str:
    """Return a setting as it may be called in `tune.space`."""
    return setting.removeprefix("objective.")


def value_text(value: Any) -> str:
    """Return a setting's value; an en dash where a point does not have it."""
    if value is None:
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def range_text(written: Mapping[str, Sequence[Any]]) -> str:
    """Return a range in words."""
    ((kind, values),) = written.items()
    if kind == "choice":
        return ", ".join(value_text(value) for value in values)
    return f"{value_text(values[0])} to {value_text(values[1])}" + {"loguniform": ", by its logarithm"}.get(kind, "")


def became(point: Mapping[str, Any]) -> str:
    """Return what became of a point's runs."""
    whole = point["runs"] - point["stopped"] - point["failed"]
    parts = [(whole, "whole"), (point["stopped"], "ended early"), (point["failed"], "failed")]
    told = [f"{number} {what}" for number, what in parts if number]
    return told[0].partition(" ")[2] if len(told) == 1 and point["runs"] == 1 else ", ".join(told)


def front_picture(points: Points) -> str | None:
    """Return ranking over popularity, one dot a point, those of the front joined; None without points."""
    if not points:
        return None
    with matplotlib.rc_context(plots.STYLE):
        figure = Figure(figsize=(5.4, 3.3), dpi=72)
        axes = figure.add_axes((0.12, 0.145, 0.85, 0.82))
        on = sorted((point for point in points if point["on_front"]), key=lambda point: float(point[POPULARITY]))
        axes.plot(
            [p[POPULARITY] for p in on], [p[RANKING] for p in on], color=FRONT, linewidth=1.2, drawstyle="steps-post"
        )
        for place, point in reversed(list(enumerate(points))):
            colour = _colour(point, place)
            filled = colour if point["whole"] else plots.PAPER
            axes.plot(point[POPULARITY], point[RANKING], "o", color=colour, markersize=6, markerfacecolor=filled)
            if point["on_front"]:
                axes.annotate(
                    str(point["point"]), (point[POPULARITY], point[RANKING]), (6, 4), textcoords="offset points"
                )
        axes.margins(x=0.08, y=0.12)
        axes.grid(axis="y")
        axes.set_xlabel("training interactions of the ten items shown first, on average")
        axes.set_ylabel(f"validation {measure_name(RANKING)}")
        return plots.as_svg(figure, f"Validation {measure_name(RANKING)} of each point over the popularity it shows")


def parallel_picture(points: Points, ranges: Mapping[str, Mapping[str, Sequence[Any]]]) -> str | None:
    """Return one line a point across an axis a setting and a goal; None with fewer than two points."""
    if len(points) < 2:
        return None
    with matplotlib.rc_context(plots.STYLE):
        names = [*ranges, RANKING, POPULARITY]
        figure = Figure(figsize=(max(5.4, 1.35 * len(names)), 3.2), dpi=72)
        axes = figure.add_axes((0.07, 0.1, 0.86, 0.78))
        placed = {name: _heights([_value(point, name) for point in points], ranges.get(name)) for name in names}
        for place, point in reversed(list(enumerate(points))):
            colour = _colour(point, place)
            heights = [placed[name][place] for name in names]
            width = 2.0 if place == 0 else 1.2 if point["on_front"] else 0.8
            axes.plot(range(len(names)), heights, color=colour, linewidth=width, marker="o", markersize=2.5)
        for place, name in enumerate(names):
            axes.axvline(place, color=plots.RULE, linewidth=0.8, zorder=0)
            _label(axes, place, name, [_value(point, name) for point in points], ranges.get(name))
        axes.set_xlim(-0.3, len(names) - 0.7)
        axes.set_ylim(-0.06, 1.06)
        axes.axis("off")
        return plots.as_svg(figure, "Settings of each point, and what came out, a line a point")


def _value(point: Mapping[str, Any], name: str) -> Any:
    return point[name] if name in (RANKING, POPULARITY) else point["settings"].get(name)


def _colour(point: Mapping[str, Any], place: int) -> str:
    return BEST if place == 0 else FRONT if point["on_front"] else OTHER


def _heights(values: Sequence[Any], written: Mapping[str, Sequence[Any]] | None) -> list[float]:
    """Return where each value stands on its axis, 0 to 1; NaN where there is none."""
    kind, ends = next(iter(written.items())) if written else ("uniform", (min(values), max(values)))
    if kind == "choice":
        # True and 1 are different choices, though equal.
        order = [repr(choice) for choice in ends]
        return [math.nan if value is None else order.index(repr(value)) / max(1, len(order) - 1) for value in values]
    scale = math.log if kind == "loguniform" else float
    low, high = scale(ends[0]), scale(ends[1])
    return [math.nan if value is None else (scale(value) - low) / ((high - low) or 1.0) for value in values]


def _label(
    axes: Axes, place: int, name: str, values: Sequence[Any], written: Mapping[str, Sequence[Any]] | None
) -> None:
    """Name an axis above it, and write values beside it."""
    shown = short_name(name).rpartition(".")[2] if written else measure_name(name)
    axes.annotate(shown, (place, 1.06), (0, 6), textcoords="offset points", ha="center", color=plots.INK)
    if written and "choice" in written:
        marks = list(written["choice"])
    else:
        marks = list(next(iter(written.values()))) if written else [min(values), max(values)]
    heights = _heights(marks, written if written else {"uniform": marks})
    for mark, height in zip(marks, heights, strict=True):
        text = plain(mark) if written is None else value_text(mark)
        axes.annotate(text, (place, height), (4, -3), textcoords="offset points", color=plots.MUTED, fontsize=7.5)


def gained(point: Mapping[str, Any]) -> bool:
    """Return whether a judged point is better than the model it starts from; taken to be where nobody looked."""
    return point[START] is None or bool(point[RANKING] > point[START])


def _lead(points: Points) -> str:
    """Return what came out, in a sentence or two."""
    best = points[0] if points and points[0][RANKING] is not None else None
    if best is None:
        return "No point could be judged."
    settings = ", ".join(f"{short_name(name)} {value_text(value)}" for name, value in best["settings"].items())
    on = sum(point["on_front"] for point in points)
    beside = (
        "no other point is on the front of ranking against popularity"
        if on <= 1
        else f"{on} points are on the front of ranking against popularity"
    )
    return (
        f"Best of {len(points)} points: {measure_name(RANKING)} {plain(best[RANKING])} on validation, with {settings}; "
        f"{beside}." + ("" if gained(best) else f" {NOTHING_GAINED}")
    )
