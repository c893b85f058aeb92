"""The table of variety: which k, which genres at the ends, and what is not known."""

from typing import Any

from recray.report.variety import shown_ks, varieties

METRICS = [{"model": "sft", "div_ratio": 0.4, "div_ratio@5": 0.3, "div_ratio@10": 0.2, "div_ratio@20": 0.1}]


def _gap(k: int, shares: list[float | None], mgu: float | None = 0.1) -> dict[str, Any]:
    return {"k": k, "mgu": mgu, "dgu": mgu, "items": 9, "without_genre": 0, "shares": shares}


def _genres(*own: dict[str, Any]) -> dict[str, Any]:
    chosen = {name: value for name, value in _gap(1, [0.3, 0.3, 0.4]).items() if name != "k"}
    met = {"items": 9, "without_genre": 0, "shares": [0.5, 0.3, 0.2]}
    return {"genres": ["a", "b", "c"], "met": met, "chosen": chosen, "models": {"sft": list(own)}}


def test_without_genres_the_first_item_and_the_largest_k_up_to_ten() -> None:
    assert shown_ks(METRICS, None) == [1, 10]
    assert shown_ks([{"model": "sft", "div_ratio": 0.4, "div_ratio@20": 0.2}], None) == [1]
    (found,) = varieties(METRICS, None)
    assert (found.div_ratios, found.gaps, found.too_much) == ([0.4, 0.2], [(None, None)] * 2, None)
    assert varieties([{"model": "sft", "hr@1": 0.2}], None) == varieties([], None) == []


def test_the_ends_are_those_of_the_largest_k() -> None:
    found, chosen = varieties(METRICS, _genres(_gap(1, [1.0, 0.0, 0.0]), _gap(5, [0.2, 0.25, 0.55])))
    assert found.div_ratios == [0.4, 0.3]
    assert found.too_much is not None
    assert found.too_little is not None
    assert (found.too_much[0], round(found.too_much[1], 9)) == ("c", 0.35)
    assert (found.too_little[0], round(found.too_little[1], 9)) == ("a", -0.3)
    assert (chosen.gaps, chosen.div_ratios) == ([(0.1, 0.1), (None, None)], [None, None])


def test_a_model_that_shows_no_genre_has_no_ends() -> None:
    found, _ = varieties(METRICS, _genres(_gap(1, [None] * 3, None)))
    assert (found.gaps, found.too_much, found.too_little) == ([(None, None)], None, None)
