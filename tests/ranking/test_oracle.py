"""Ranks and metrics against trec_eval, the retrieval community's reference program, by its Python binding.

trec_eval puts equal scores in falling order of the document's name. The target gets the lowest name, so that ties count
against it there as they do here.
"""

import numpy as np
import pytrec_eval
from hypothesis import given
from hypothesis import strategies as st

from recray.ranking.metrics import hit_rate, ndcg, ranks, reciprocal_rank
from recray.ranking.ragged import padded

KS = (1, 5, 10, 20, 50)
TARGET = "0"
Row = tuple[float, list[float]]  # the target's score, the others'

# Whole numbers tie often; floats of 32 bits are what scorers return.
scores = st.one_of(st.integers(-2, 2).map(float), st.floats(width=32, allow_nan=False, allow_infinity=False))
rows = st.lists(st.tuples(scores, st.lists(scores, max_size=60)), max_size=5)


def _oracle(table: list[Row]) -> dict[str, list[float]]:
    """Return trec_eval's measures, one value a row."""
    run = {
        f"q{number}": {TARGET: target, **{f"1{place:03}": score for place, score in enumerate(others)}}
        for number, (target, others) in enumerate(table)
    }
    cuts = ",".join(map(str, KS))
    measures = {f"ndcg_cut.{cuts}", f"recall.{cuts}", f"success.{cuts}", "recip_rank"}
    evaluator = pytrec_eval.RelevanceEvaluator({query: {TARGET: 1} for query in run}, measures)
    found = evaluator.evaluate(run)
    names = [f"{stem}_{k}" for stem in ("ndcg_cut", "recall", "success") for k in KS] + ["recip_rank"]
    return {name: [found[query][name] for query in run] for name in names}


def _ours(table: list[Row], places: list[int]) -> dict[str, np.ndarray]:
    """Return our measures with the target put at `places` among its candidates."""
    rows = [np.insert(np.array(others, dtype=np.float64), place, target) for (target, others), place in zip(
        table, places, strict=True)]  # fmt: skip
    flat = np.concatenate(rows) if rows else np.zeros(0)
    candidates, valid = padded(flat, np.array([len(row) for row in rows], dtype=np.int64), fill=0.0)
    found = ranks(candidates, np.array(places, dtype=np.int64), valid)
    measured = {"recip_rank": reciprocal_rank(found)}
    for k in KS:
        # With one target a row, recall and success are the hit rate.
        measured |= {
            f"ndcg_cut_{k}": ndcg(found, k),
            f"recall_{k}": hit_rate(found, k),
            f"success_{k}": hit_rate(found, k),
        }
    return measured


def _compare(table: list[Row], places: list[int]) -> None:
    expected, found = _oracle(table), _ours(table, places)
    assert expected.keys() == found.keys()
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, rtol=0, atol=1e-9, err_msg=name)


@given(rows, st.data())
def test_metrics_equal_trec_eval(table: list[Row], data: st.DataObject) -> None:
    _compare(table, [data.draw(st.integers(0, len(others))) for _, others in table])


def test_metrics_equal_trec_eval_where_it_is_hard() -> None:
    tied, alone = (1.0, [1.0] * 60), (0.0, [])
    near = (1.0, [float(np.nextafter(np.float32(1), np.float32(2))), float(np.nextafter(np.float32(1), np.float32(0)))])
    huge = (3e38, [-3e38, 3e38, 0.0])
    _compare([tied, alone, near, huge, (-0.0, [0.0])], [7, 0, 1, 2, 0])
    _compare([], [])


def test_metrics_equal_trec_eval_on_a_thousand_rows() -> None:
    generator = np.random.default_rng(0)
    table = [
        (
            float(generator.integers(0, 30)),
            generator.integers(0, 30, size=generator.integers(0, 100)).astype(float).tolist(),
        )
        for _ in range(1000)
    ]
    _compare(table, [int(generator.integers(0, len(others) + 1)) for _, others in table])
