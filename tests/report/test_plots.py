"""Pictures: what is drawn from which keys, and SVG that leans on nothing outside the page."""

import re

import numpy as np
import pytest

from recray.report import plots
from recray.report.plots import curve_panels, difference_picture, exposure_picture, popularity_picture, running_mean

EXPOSURE = {
    "groups": ["top 1 %", "1–5 %", "5–20 %", "20–50 %", "rest"],
    "models": {"popularity": [1.0, 0.0, 0.0, 0.0, 0.0], "aligned": [0.2, 0.2, 0.2, 0.2, 0.2]},
    "chosen": [0.1, 0.2, 0.3, 0.2, 0.2],
}


def _interval(value: float, half: float | None = 0.01) -> dict[str, float | None]:
    known = half is not None
    return {"value": value, "low": value - half if known else None, "high": value + half if known else None}


def _entry(model: str, ndcg: float, popularity: float, half: float | None = 0.01) -> dict[str, object]:
    return {"model": model, "ndcg@10": _interval(ndcg, half), "average_popularity": _interval(popularity, half)}


def test_keys_that_belong_together_share_a_panel() -> None:
    lines = [
        {"kind": "train", "step": 1, "loss": 2.0, "positive_reward": 0.1, "negative_reward": -0.1, "novel_key": 1},
        {"kind": "train", "step": 2, "loss": 1.0, "novel_key": 2},
        {"kind": "validation", "step": 2, "hr@1": 0.5, "ndcg@10": 0.6, "mrr": 0.55},
    ]
    panels = {panel.title: panel.svg for panel in curve_panels(lines, fit="SFT")}
    assert list(panels) == ["Loss", "Validation ranking", "Rewards, nats", "Novel key"]
    for name in ("HR@1", "NDCG@10", "MRR"):
        assert name in panels["Validation ranking"]


def test_curves_tolerate_what_is_missing_or_not_a_number() -> None:
    lines = [
        {"kind": "train", "step": 1, "loss": float("nan"), "note": "text", "done": True, "kl": None},
        {"pass": 2, "loss": 1.5},
        {"loss": 1.0},
    ]
    assert [panel.title for panel in curve_panels(lines, fit="SASRec")] == ["Loss"]
    assert curve_panels([], fit="SASRec") == []


def test_long_curves_are_thinned() -> None:
    lines = [{"kind": "train", "step": step, "loss": float(step % 7)} for step in range(20_000)]
    (panel,) = curve_panels(lines, fit="SFT")
    assert len(panel.svg) < 60_000


def test_running_mean_by_hand_and_centred() -> None:
    assert running_mean(np.array([3.0, 0.0, 3.0, 6.0, 0.0]), 3).tolist() == [3.0, 2.0, 3.0, 3.0, 0.0]
    line = np.arange(50.0)
    np.testing.assert_allclose(running_mean(line, 9), line)  # a slope stays where it is, at the ends too


@pytest.mark.parametrize("half", [0.01, None])
def test_pictures_name_every_model(half: float | None) -> None:
    metrics = [_entry("popularity", 0.4, 200.0, half), _entry("aligned", 0.6, 50.0, half), _entry("new", 0.5, 60.0)]
    picture = popularity_picture(metrics, 55.0)
    assert picture is not None
    for text in ("Popularity", "Aligned", "new", "what people chose", "NDCG@10"):
        assert text in picture
    pairs = [{"model": "aligned", "minus": "sft", "ndcg@10": _interval(0.01, half)}]
    differences = difference_picture(pairs)
    assert differences is not None
    assert "Aligned − SFT" in differences


def test_no_numbers_no_picture() -> None:
    assert popularity_picture([], None) is None
    assert popularity_picture([{"model": "sft", "ndcg@10": _interval(0.5)}], None) is None
    assert difference_picture([]) is None


def test_labels_of_near_points_lie_apart() -> None:
    metrics = [_entry(model, 0.60 + place / 1e4, 50.0 + place) for place, model in enumerate(plots.MODELS)]
    picture = popularity_picture(metrics, None) or ""
    names = ("Popularity", "Co-occurrence", "SASRec", "SFT", "Aligned")
    found = re.findall(r'<text[^>]*? y="([\d.]+)"[^>]*>([^<]+)<', picture)
    heights = sorted(float(height) for height, name in found if name in names)
    assert len(heights) == 5
    assert min(np.diff(heights)) > 8.0


def test_bars_show_their_shares() -> None:
    svg = exposure_picture(EXPOSURE)
    assert ">100</text>" in svg
    assert "What people chose" in svg


def test_svg_takes_colours_from_the_page_and_nothing_from_elsewhere() -> None:
    svg = exposure_picture(EXPOSURE)
    assert svg.startswith("<svg viewBox=")
    assert "http" not in svg
    assert "<metadata" not in svg
    assert re.search(r"#[0-9a-f]{6}", svg) is None
    assert "var(--group-0)" in svg
    assert "var(--sans)" in svg
    assert "DejaVu" not in svg
    assert exposure_picture(EXPOSURE) == svg  # drawn again, the same
