"""Several runs of a method as one line: means over runs row by row, users resampled, seeds told apart."""

import numpy as np
import pytest

from recray.ranking.metrics import ndcg
from recray.ranking.paired import holm, sign_flip_p_values
from recray.ranking.seeds import over_seeds
from recray.ranking.summary import Ranked, Settings, summaries

USERS = np.repeat(np.arange(30), 3)
POPULARITY = np.arange(50)
SETTINGS = Settings(ks=(1, 10), samples=300, confidence=0.95, seed=5)


def ranked(seed: int, worst: int) -> Ranked:
    generator = np.random.default_rng(seed)
    shown = np.stack([generator.permutation(50)[:10] for _ in USERS])
    return Ranked(generator.integers(1, worst, size=len(USERS)), shown)


def test_a_method_of_one_run_is_summed_up_as_a_model_of_the_evaluation() -> None:
    each = {"start": ranked(0, 20), "napo": ranked(1, 10)}
    found = over_seeds({name: [run] for name, run in each.items()}, "start", USERS, POPULARITY, SETTINGS, 10)
    expected = summaries(each, [("napo", "start")], USERS, POPULARITY, SETTINGS)
    for got, want in zip([*found.models, *found.pairs], [*expected.models, *expected.pairs], strict=True):
        for name in ("ndcg@10", "hr@1", "mrr", "average_popularity@10"):
            assert got[name] == pytest.approx(want[name])
    assert [entry["between_seeds"] for entry in found.models] == [None, None]


def test_runs_are_averaged_row_by_row_and_differ_by_their_seeds() -> None:
    runs = [ranked(seed, 12) for seed in (1, 2, 3)]
    found = over_seeds({"start": [ranked(0, 20)], "napo": runs}, "start", USERS, POPULARITY, SETTINGS, 10)
    start, napo = found.models
    of_runs = np.array([ndcg(run.ranks, 10).mean() for run in runs])
    assert napo["ndcg@10"]["value"] == pytest.approx(of_runs.mean())
    assert napo["between_seeds"] == pytest.approx(of_runs.std(ddof=1))
    assert (start["runs"], napo["runs"]) == (1, 3)
    (pair,) = found.pairs
    assert (pair["model"], pair["minus"]) == ("napo", "start")
    assert pair["ndcg@10"]["value"] == pytest.approx(of_runs.mean() - start["ndcg@10"]["value"])


def test_every_method_is_tested_against_the_start_and_corrected_for_all() -> None:
    runs = {"start": [ranked(0, 20)], "a": [ranked(1, 9), ranked(2, 9)], "b": [ranked(3, 20)]}
    found = over_seeds(runs, "start", USERS, POPULARITY, SETTINGS, 10)
    own = {name: np.mean([ndcg(run.ranks, 10) for run in each], axis=0) for name, each in runs.items()}
    expected = sign_flip_p_values(np.stack([own[name] - own["start"] for name in "ab"], axis=1), USERS, seed=5)
    assert [pair["test"]["p"] for pair in found.pairs] == pytest.approx(expected.tolist())
    assert [pair["test"]["p_holm"] for pair in found.pairs] == pytest.approx(holm(expected).tolist())
    assert found.pairs[0]["test"]["p_holm"] < 0.05 < found.pairs[1]["test"]["p_holm"]


def test_nothing_to_compare_with_is_no_pair() -> None:
    assert over_seeds({"start": [ranked(0, 20)]}, "start", USERS, POPULARITY, SETTINGS, 10).pairs == []
