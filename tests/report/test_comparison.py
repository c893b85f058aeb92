"""The page that compares methods: what it says, and the curves behind it."""

import re
from typing import Any

import pytest

from recray.report.comparison import Comparison, cost, paths, render_comparison

LONG = "napo margin=none sharing=none global_batch=64"


def interval(value: float, half: float = 0.01) -> dict[str, float]:
    return {"value": value, "low": value - half, "high": value + half}


def entry(model: str, ndcg: float, popularity: float, **more: Any) -> dict[str, Any]:
    own = {"hr@1": interval(ndcg / 2), "ndcg@10": interval(ndcg), "average_popularity": interval(popularity, 3.0)}
    return {"model": model, "rows": 900, "users": 300, "runs": 2, "between_seeds": 0.0042, **own, **more}


def pair(model: str, value: float, p_holm: float) -> dict[str, Any]:
    test = {"measure": "ndcg@10", "comparisons": 3, "p": p_holm / 3, "p_holm": p_holm}
    return {"model": model, "minus": "start", "ndcg@10": interval(value), "test": test}


def one_run(method: str, seed: int, values: list[float], pace: float) -> dict[str, Any]:
    curve = [{"step": 25 * n, "seconds": pace * n, "value": value} for n, value in enumerate(values)]
    return {
        "method": method,
        "seed": seed,
        "settings": '{"beta": 1.0}',
        "steps": curve[-1]["step"],
        "seconds": curve[-1]["seconds"],
        "best": max(values),
        "best_step": 25,
        "curve": curve,
    }


@pytest.fixture
def contents() -> Comparison:
    runs = [
        one_run("dpo", 0, [0.40, 0.42, 0.44], 10.0),
        one_run("dpo", 1, [0.40, 0.40], 20.0),
        one_run(LONG, 0, [0.40, 0.46], 30.0),
        one_run("more sft", 0, [0.40, 0.39], 5.0),
    ]
    metrics = [
        entry("popularity", 0.2, 90.0, runs=1, between_seeds=None),
        entry("start", 0.40, 40.0, runs=1, between_seeds=None),
        entry("dpo", 0.43, 50.0),
        entry(LONG, 0.46, 30.0),
        entry("more sft", 0.38, 41.0),
    ]
    pairs = [pair("dpo", 0.005, 0.4), pair(LONG, 0.06, 0.003), pair("more sft", -0.02, 0.01)]
    return Comparison("demo <b>", metrics, pairs, runs)


def test_the_page_says_what_came_out(contents: Comparison) -> None:
    page = render_comparison(contents)
    text = " ".join(re.sub(r"<[^>]*>", " ", page.split("</style>")[1]).split())
    assert (
        f"Against the SFT model (NDCG@10 0.400): {LONG} better; more sft worse; 1 of 3 can’t be told from it." in text
    )
    for part in (
        "demo &lt;b&gt;",
        "4 runs from one SFT model",
        "900 test rows of 300 users",
        "SFT, the start",
        "0.0042",
    ):
        assert part in text, part
    # Means over runs: dpo took 50 and 25 steps, 20 and 20 seconds.
    assert re.search(r"dpo 2 .* 0\.0042 50\.0 38 20\.0", text)
    assert page.count("<svg") == 3
    assert "<b>" not in page.split("</style>")[1]


def test_a_curve_is_the_mean_over_runs_as_far_as_all_go(contents: Comparison) -> None:
    found = paths(contents.runs, "seconds")
    assert list(found) == ["dpo", LONG, "more sft"]
    x, y = found["dpo"]
    assert x == pytest.approx([0.0, 15.0])
    assert y == pytest.approx([0.40, 0.41])
    assert paths(contents.runs, "step")["dpo"][0] == pytest.approx([0, 25])


def test_a_model_without_runs_has_no_cost(contents: Comparison) -> None:
    assert cost(contents.runs, "popularity") is None
    assert cost(contents.runs, "dpo") == {"steps": 37.5, "seconds": 20.0}


def test_nothing_to_compare_is_said() -> None:
    page = render_comparison(Comparison("demo", [entry("start", 0.4, 40.0)], [], []))
    assert "nothing was compared" in page
    assert page.count("<svg") == 1  # quality against popularity, of the start alone
