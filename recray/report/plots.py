"""Pictures as SVG that takes its colours from the page, so that one picture serves paper, light and dark screens.

matplotlib draws in placeholder colours; each becomes a CSS variable that `page.html` gives a value to.
"""

import html
import io
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from recray.report.tables import Entry, headline_measure, measure_name, model_name

# Placeholder colours: what matplotlib writes, and the CSS variable it stands for.
INK, MUTED, RULE, PAPER = "#010101", "#010102", "#010103", "#010104"
MODELS = {
    "popularity": "#020101",
    "cooccurrence": "#020102",
    "sasrec": "#020103",
    "sft": "#020104",
    "aligned": "#020105",
}
OTHER_MODEL = "#020106"
GROUPS = ("#030101", "#030102", "#030103", "#030104", "#030105")
GROUP_TEXT = ("#040101", "#040102", "#040103", "#040104", "#040105")
SERIES = ("#050101", "#050102", "#050103")

VARIABLES = {
    **{INK: "ink", MUTED: "muted", RULE: "rule", PAPER: "paper", OTHER_MODEL: "other"},
    **{colour: f"model-{model}" for model, colour in MODELS.items()},
    **{colour: f"group-{place}" for place, colour in enumerate(GROUPS)},
    **{colour: f"on-group-{place}" for place, colour in enumerate(GROUP_TEXT)},
    **{colour: f"series-{place}" for place, colour in enumerate(SERIES)},
}

_CYCLE = ("model-aligned", "series-1", "group-1", "model-sasrec", "group-3", "series-2", "model-popularity", "group-2")
_LONGEST_NAME = 26  # letters of a method's name beside its line

MARKERS = {"popularity": "s", "cooccurrence": "D", "sasrec": "^", "sft": "o", "aligned": "o"}

STYLE = {
    "svg.fonttype": "none",  # text stays text: it is searched, read aloud and set in the page's font
    "font.family": "sans-serif",
    "font.size": 8.5,
    "axes.edgecolor": RULE,
    "axes.labelcolor": MUTED,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.unicode_minus": True,
    "xtick.color": RULE,
    "ytick.color": RULE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "text.color": INK,
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "lines.solid_capstyle": "round",
    "lines.solid_joinstyle": "round",
}

_LABEL_WIDTH, _LABEL_HEIGHT = 70.0, 10.5  # of a point's name, in points (figures are drawn at 72 a inch)
_SMOOTH_FROM = 40  # points; fewer are drawn as they are


class Series(NamedTuple):
    """One curve: where and how high."""

    name: str
    steps: Sequence[float]
    values: Sequence[float]


class Panel(NamedTuple):
    """A small picture of curves that share an axis."""

    title: str
    svg: str


# Keys that belong in one panel, in the order of the page; every other key gets a panel of its own after these.
TOGETHER = (
    ("Loss", ("train loss",)),
    ("Loss", ("loss",)),
    ("Validation ranking", ("validation hr@1", "validation ndcg@10", "validation mrr")),
    ("Validation HR@10", ("validation hr@10",)),
    ("Validation ranking", ("validation_hr@1", "validation_hr@10", "validation_ndcg@10", "validation_mrr")),
    ("Rewards, nats", ("train positive_reward", "train negative_reward")),
    ("Margin", ("train margin",)),
    ("Accuracy", ("train accuracy",)),
    ("KL to the reference, nats", ("train kl",)),
    ("Effective negatives a user", ("train effective_negatives",)),
    ("Gradient norm", ("train grad_norm",)),
    ("Seconds a pass", ("seconds",)),
    ("Learning rate", ("train learning_rate",)),
    ("Tokens a second", ("train tokens_per_s",)),
    ("Share of time waiting for data", ("train data_wait_share",)),
)
_EXACT = {"learning rate"}  # set, not measured: nothing to smooth
_NOT_A_CURVE = {"kind", "step", "pass", "best_pass", "time", "seconds"}


def curve_panels(lines: Sequence[Mapping[str, Any]], *, fit: str) -> list[Panel]:
    """Return one panel for what belongs together among the numeric keys of metrics lines; none for no lines.

    Args:
        lines: objects with `step` (else `pass`, else their place), perhaps `kind`, and any numeric keys. Lines may
            lack any key; numbers that are not finite are left out.
        fit: what was fitted, for the description of each picture.
    """
    series = _series(lines)
    panels, drawn = [], set()
    for title, keys in TOGETHER:
        chosen = [series[key] for key in keys if key in series]
        drawn |= set(keys)
        if chosen:
            panels.append(Panel(title, _curves(f"{title} of {fit}", chosen)))
    for key, curve in series.items():
        if key not in drawn:
            title = key.removeprefix("train ").replace("_", " ")
            title = title[:1].upper() + title[1:]
            panels.append(Panel(title, _curves(f"{title} of {fit}", [curve])))
    return panels


def popularity_picture(metrics: Sequence[Entry], chosen_popularity: float | None) -> str | None:
    """Return quality against popularity: NDCG with its interval over what is shown first; None without the numbers.

    Args:
        metrics: `evaluate/metrics.json`.
        chosen_popularity: mean popularity of what people chose, drawn as a line.
    """
    measure = headline_measure(metrics)
    points = [entry for entry in metrics if "average_popularity" in entry]
    if measure is None or not points:
        return None
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5.4, 3.3), dpi=72)
        axes = figure.add_axes((0.1, 0.145, 0.87, 0.77))
        if chosen_popularity is not None:
            axes.axvline(chosen_popularity, color=MUTED, linewidth=0.9, linestyle=(0, (4, 3)))
            axes.annotate(
                "what people chose",
                (chosen_popularity, 1.0),
                (0, 4),
                xycoords=("data", "axes fraction"),
                textcoords="offset points",
                color=MUTED,
                ha="center",
            )
        for entry in points:
            _point(axes, entry, measure)
        axes.margins(x=0.16, y=0.14)
        _label_points(axes, points, measure)
        axes.grid(axis="y")
        axes.set_xlabel("training interactions of the first item shown, on average")
        axes.set_ylabel(measure_name(measure))
        return as_svg(figure, f"{measure_name(measure)} of each model over the popularity of what it shows first")


def paths_picture(paths: Mapping[str, tuple[Sequence[float], Sequence[float]]], over: str, measure: str) -> str | None:
    """Return quality over what it cost: one line a method, named at its end; None without any point.

    Args:
        paths: of each method, (cost, quality) of its points.
        over: what the cost is, for axis and description.
        measure: what the quality is.
    """
    drawn = {method: path for method, path in paths.items() if path[0]}
    if not drawn:
        return None
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5.4, 3.3), dpi=72)
        axes = figure.add_axes((0.12, 0.145, 0.6, 0.8))
        for method, (x, y) in drawn.items():
            colour = _placeholder(method_colour(method, list(paths)))
            axes.plot(x, y, color=colour, linewidth=1.4, marker="o", markersize=3)
        axes.margins(x=0.03, y=0.1)
        axes.autoscale_view()
        lowest = np.inf
        for method, (x, y) in sorted(drawn.items(), key=lambda each: -each[1][1][-1]):
            at = axes.transData.transform((x[-1], y[-1]))[1]
            place = min(at, lowest - _LABEL_HEIGHT)
            lowest = place
            text = method if len(method) <= _LONGEST_NAME else method[: _LONGEST_NAME - 1] + "…"
            axes.annotate(
                text,
                (x[-1], y[-1]),
                (1.02, (place - axes.bbox.y0) / axes.bbox.height),
                textcoords="axes fraction",
                color=INK,
                va="center",
                arrowprops={"arrowstyle": "-", "color": RULE, "linewidth": 0.6},
            )
        axes.grid(axis="y")
        axes.set_xlabel(over)
        axes.set_ylabel(f"validation {measure_name(measure)}")
        return as_svg(figure, f"Validation {measure_name(measure)} of each method over {over}")


def method_colour(method: str, methods: Sequence[str]) -> str:
    """Return the CSS variable of a method's colour on a page that compares them; baselines keep their own."""
    if method in methods:
        return _CYCLE[methods.index(method) % len(_CYCLE)]
    return VARIABLES[_colour("sft" if method == "start" else method)]


def _placeholder(variable: str) -> str:
    return next(colour for colour, name in VARIABLES.items() if name == variable)


def exposure_picture(exposure: Mapping[str, Any]) -> str:
    """Return bars: how what each model shows first spreads over the catalogue's popularity groups."""
    rows = [(model_name(model), shares) for model, shares in exposure["models"].items()]
    rows.append(("What people chose", exposure["chosen"]))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5.4, 0.36 * len(rows) + 0.62))
        axes = figure.add_axes((0.25, 0.17, 0.73, 0.72))
        for place, (_, shares) in enumerate(rows):
            left = 0.0
            for group, share in enumerate(shares):
                axes.barh(place, share, 0.66, left, color=GROUPS[group], edgecolor=PAPER, linewidth=0.8)
                if share >= 0.07:
                    axes.text(
                        left + share / 2, place, f"{100 * share:.0f}", color=GROUP_TEXT[group], ha="center", va="center"
                    )
                left += share
        axes.set_yticks(range(len(rows)), [name for name, _ in rows])
        axes.tick_params(axis="y", labelcolor=INK)
        axes.set_xlim(0, 1)
        axes.set_ylim(len(rows) - 0.45, -0.55)
        axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "25", "50", "75", "100 %"])
        axes.spines[["left", "bottom"]].set_visible(False)
        _group_legend(axes, exposure["groups"])
        return as_svg(figure, "Share of first recommendations by popularity group of the catalogue")


def difference_picture(differences: Sequence[Entry]) -> str | None:
    """Return each pair's difference with its interval beside zero; None without the numbers."""
    measure = headline_measure(differences)
    if measure is None:
        return None
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5.4, 0.34 * len(differences) + 0.6))
        axes = figure.add_axes((0.32, 0.28, 0.65, 0.68))
        axes.axvline(0.0, color=MUTED, linewidth=0.9)
        for place, entry in enumerate(differences):
            interval, colour = entry[measure], _colour(entry["model"])
            if interval["low"] is not None:
                axes.plot([interval["low"], interval["high"]], [place, place], color=colour, linewidth=2.2)
            axes.plot(interval["value"], place, "o", color=colour, markersize=5.5, markeredgecolor=PAPER)
        names = [f"{model_name(e['model'])} − {model_name(e['minus'])}" for e in differences]
        axes.set_yticks(range(len(names)), names)
        axes.tick_params(axis="y", labelcolor=INK)
        axes.set_ylim(len(names) - 0.4, -0.6)
        axes.grid(axis="x")
        axes.locator_params(axis="x", nbins=5)
        axes.spines["left"].set_visible(False)
        axes.set_xlabel(f"difference in {measure_name(measure)}")
        return as_svg(figure, f"Paired differences in {measure_name(measure)} with their intervals")


def running_mean(values: NDArray[np.float64], window: int) -> NDArray[np.float64]:
    """Return the mean of the `window` values around every place; of those there are near the ends.

    The window is centred, so that a curve isn't drawn later than it happened; an even one is taken one wider.
    """
    sums = np.concatenate([[0.0], np.cumsum(values)])
    place = np.arange(len(values))
    # As far to one side as to the other, also near an end: else a slope would bend there.
    reach = np.minimum(window // 2, np.minimum(place, len(values) - 1 - place))
    mean: NDArray[np.float64] = (sums[place + reach + 1] - sums[place - reach]) / (2 * reach + 1)
    return mean


def _series(lines: Sequence[Mapping[str, Any]]) -> dict[str, Series]:
    found: dict[str, Series] = {}
    for place, line in enumerate(lines):
        kind = f"{line['kind']} " if "kind" in line else ""
        step = line.get("step", line.get("pass", place))
        for key, value in line.items():
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if key in _NOT_A_CURVE or not is_number or not np.isfinite(value):
                continue
            name = key.removeprefix("validation_").replace("_", " ")
            name = measure_name(name) if "@" in name or name == "mrr" else name
            curve = found.setdefault(kind + key, Series(name, [], []))
            curve.steps.append(float(step))  # type: ignore[attr-defined]
            curve.values.append(float(value))  # type: ignore[attr-defined]
    return found


def _curves(title: str, curves: Sequence[Series]) -> str:
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(3.1, 1.75))
        axes = figure.add_axes((0.135, 0.13, 0.83, 0.76 if len(curves) > 1 else 0.82))
        for place, curve in enumerate(curves):
            _draw(axes, curve, SERIES[place % len(SERIES)])
        if len(curves) > 1:
            axes.legend(
                loc="lower left",
                bbox_to_anchor=(-0.01, 0.99),
                ncols=len(curves),
                frameon=False,
                labelcolor=MUTED,
                handlelength=1.0,
                handletextpad=0.4,
                columnspacing=1.1,
                borderpad=0,
                borderaxespad=0,
                fontsize=8,
            )
        axes.grid(axis="y")
        axes.spines["left"].set_visible(False)
        axes.margins(x=0.02)
        axes.locator_params(axis="x", nbins=5, integer=True)
        axes.locator_params(axis="y", nbins=5)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.6g}".replace("-", "−"))
        return as_svg(figure, f"{title} over steps")


def _draw(axes: Axes, curve: Series, colour: str) -> None:
    steps, values = np.array(curve.steps), np.array(curve.values)
    if len(values) < _SMOOTH_FROM or curve.name in _EXACT:
        marker = "o" if len(values) <= 25 else None
        axes.plot(steps, values, color=colour, linewidth=1.4, marker=marker, markersize=3, label=curve.name)
        return
    thin = max(1, len(values) // 400)  # the eye sees no more, and the page stays small
    smooth = running_mean(values, max(5, len(values) // 20))
    axes.plot(steps[::thin], values[::thin], color=colour, linewidth=0.7, alpha=0.3)
    axes.plot(steps[::thin], smooth[::thin], color=colour, linewidth=1.5, label=curve.name)


def _point(axes: Axes, entry: Entry, measure: str) -> None:
    x, interval, model = entry["average_popularity"], entry[measure], entry["model"]
    colour = _colour(model)
    for low, high, along_x in ((x["low"], x["high"], True), (interval["low"], interval["high"], False)):
        if low is not None:
            ends = ([low, high], [interval["value"]] * 2) if along_x else ([x["value"]] * 2, [low, high])
            axes.plot(*ends, color=colour, linewidth=1.3)
    marker = MARKERS.get(model, "v")
    axes.plot(x["value"], interval["value"], marker, color=colour, markersize=7, markeredgecolor=PAPER)


def _label_points(axes: Axes, points: Sequence[Entry], measure: str) -> None:
    """Name every point to its right, from the top down, each label below those it would lie on."""
    axes.autoscale_view()  # until then places in points are those of no data
    above: list[tuple[float, float]] = []
    for entry in sorted(points, key=lambda point: -point[measure]["value"]):
        at = (entry["average_popularity"]["value"], entry[measure]["value"])
        x, y = axes.transData.transform(at)
        lowest = min((low for other, low in above if abs(other - x) < _LABEL_WIDTH), default=np.inf)
        place = min(y + 5, lowest - _LABEL_HEIGHT)
        above.append((x, place))
        weight = "bold" if entry["model"] == "aligned" else "normal"
        axes.annotate(
            model_name(entry["model"]), at, (9, place - y), textcoords="offset points", color=INK, weight=weight
        )


def _group_legend(axes: Axes, names: Sequence[str]) -> None:
    handles = [matplotlib.patches.Patch(color=GROUPS[group]) for group in range(len(names))]
    axes.legend(
        handles,
        names,
        loc="lower left",
        bbox_to_anchor=(-0.01, 1.0),
        ncols=len(names),
        frameon=False,
        labelcolor=MUTED,
        handlelength=0.8,
        handleheight=0.8,
        handletextpad=0.4,
        columnspacing=1.2,
        borderpad=0,
        borderaxespad=0.2,
        fontsize=8,
    )


def _colour(model: str) -> str:
    return MODELS.get(model, OTHER_MODEL)


def as_svg(figure: Figure, description: str) -> str:
    """Return the figure as an SVG element for a page: no header, no links, sizes and colours left to the page."""
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": description, "svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg", dpi=72, transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    opening = re.match(r"<svg[^>]*>", svg)
    view = re.search(r'viewBox="[^"]*"', svg)
    if opening is None or view is None:
        raise AssertionError("matplotlib wrote an SVG without an opening tag or a view box")
    svg = f'<svg {view.group()} role="img" aria-label="{html.escape(description)}">' + svg[opening.end() :]
    # Groups are numbered alike in every picture; what is referred to (clips, markers) has ids of its own.
    svg = re.sub(r'<g id="[^"]*"', "<g", svg).replace("xlink:href", "href")
    svg = re.sub(r"(font: (?:bold |700 )?[\d.]+px) [^;\"]*", r"\1 var(--sans)", svg)
    svg = re.sub(r"font-family: [^;\"]*", "font-family: var(--sans)", svg)
    for colour, name in VARIABLES.items():
        svg = svg.replace(colour, f"var(--{name})")
    return svg.strip()
