"""The page of a search: what it says, and what its pictures are drawn from."""

import re
from dataclasses import replace
from typing import Any

import pytest

from recray.ranking.importance import Importance
from recray.report.search import Found, became, front_picture, parallel_picture, range_text, render_search

RANGES: dict[str, dict[str, list[Any]]] = {
    "objective.margin_base": {"uniform": [0.0, 2.0]},
    "num_negatives": {"choice": [1, 3, 7]},
    "optimiser.learning_rate": {"loguniform": [1e-5, 1e-3]},
}


def point(number: int, ranking: float | None, popularity: float | None, **more: Any) -> dict[str, Any]:
    settings = {"objective.margin_base": 0.2 * number, "num_negatives": 3, "optimiser.learning_rate": 1e-4}
    standing = {"runs": 2, "stopped": 0, "failed": 0, "whole": True, "on_front": False, "errors": [], "seconds": 4.25}
    judged = {"point": number, "settings": settings, "start": 0.3, "ndcg@10": ranking, "popularity@10": popularity}
    return {**judged, "between_seeds": 0.0123, **standing, **more}


@pytest.fixture
def contents() -> Found:
    points = [
        point(7, 0.4321, 55.5, on_front=True),
        point(2, 0.4, 21.0, on_front=True),
        point(1, 0.39, 60.0, stopped=1, whole=False),
        point(4, None, None, failed=2, whole=False, between_seeds=None, errors=["no room <here>"]),
    ]
    explained = {"ndcg@10": {name: Importance(0.61, 0.22, 0.0005) for name in RANGES}}
    return Found("demo <b>", points, RANGES, explained, steps=60)


def text_of(page: str) -> str:
    return " ".join(re.sub(r"<[^>]*>", " ", page.split("</style>", 1)[1]).split())


def test_the_page_says_what_came_out(contents: Found) -> None:
    page = render_search(contents)
    text = text_of(page)
    assert (
        "Best of 4 points: NDCG@10 0.432 on validation, with margin_base 1.4, num_negatives 3, "
        "optimiser.learning_rate 0.0001; 2 points are on the front of ranking against popularity." in text
    )
    assert re.search(r"7 1\.4 3 0\.0001 0\.4321 ± 0\.0123 55\.5 ● 2 whole 4\.2", text)
    assert "1 whole, 1 ended early" in text
    assert re.search(r"4 0\.8 3 0\.0001 – – 2 failed : no room &lt;here&gt;", text)
    assert re.search(r"margin_base 0 to 2 0\.61 0\.22 &lt; 0\.001", text)
    assert "8 runs of 60 steps" in text
    assert page.count("<svg") == 2
    assert "<b>" not in page.split("</style>")[1]
    assert not re.search(r'(src|href)="http', page)


@pytest.mark.parametrize(("start", "said"), [(0.4321, True), (0.44, True), (0.4, False), (None, False)])
def test_the_page_says_so_where_no_point_is_better_than_the_start(
    contents: Found, start: float | None, said: bool
) -> None:
    points = [dict(contents.points[0], start=start), *contents.points[1:]]
    text = text_of(render_search(replace(contents, points=points)))
    assert ("No point is better than the model they all start from." in text) == said


def test_a_search_in_which_nothing_came_out_is_a_page_all_the_same() -> None:
    page = render_search(Found("demo", [point(0, None, None, failed=2, whole=False)], RANGES))
    assert "No point could be judged." in text_of(page)
    assert page.count("<svg") == 0


def test_the_front_is_joined_and_named(contents: Found) -> None:
    judged = contents.points[:3]
    svg = front_picture(judged)
    assert svg is not None
    named = re.findall(r">(\d)</text>", svg)
    assert {"7", "2"} <= set(named)
    assert "1" not in named  # not on the front
    assert front_picture([]) is None


def test_lines_cross_an_axis_a_setting_and_a_goal_and_skip_what_a_point_lacks(contents: Found) -> None:
    svg = parallel_picture(contents.points[:3], RANGES)
    assert svg is not None
    for name in ("margin_base", "num_negatives", "learning_rate", "NDCG@10", "popularity@10"):
        assert f">{name}</text>" in svg, name
    lacking = {**contents.points[1], "settings": {"num_negatives": 1}}
    assert parallel_picture([contents.points[0], lacking], RANGES) is not None
    assert parallel_picture(contents.points[:1], RANGES) is None


def test_ranges_and_fates_in_words() -> None:
    assert [range_text(written) for written in RANGES.values()] == [
        "0 to 2",
        "1, 3, 7",
        "1e-05 to 0.001, by its logarithm",
    ]
    assert became(point(0, 0.1, 1.0, runs=1)) == "whole"
    assert became(point(0, 0.1, 1.0, runs=1, stopped=1)) == "ended early"
    assert became(point(0, 0.1, 1.0, runs=3, stopped=1, failed=1)) == "1 whole, 1 ended early, 1 failed"
