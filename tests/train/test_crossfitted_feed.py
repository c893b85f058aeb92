"""Confidences in the feed by the model fitted without the borrower's fold; all else by the one of all users."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from recray import schema
from recray.config import Objective
from recray.data.examples import ExampleShards, join_examples, met_in_training, write_shards
from recray.train.feeding import AlignFeed, Share
from recray.train.order import Order, rows_of_step

ORDER = Order(num_rows=24, global_batch=8, seed=5)
FOLDS = [row // 2 % 2 for row in range(24)]  # of a user's two rows the same


@pytest.fixture(scope="module")
def judges(world: Any) -> list[torch.Tensor]:
    """Item vectors of two folds, of a width of their own."""
    rng = np.random.default_rng(7)
    return [torch.from_numpy(rng.normal(size=(len(world.item_vectors), 5)).astype(np.float32)) for _ in range(2)]


@pytest.fixture(scope="module")
def shards(world: Any, tmp_path_factory: pytest.TempPathFactory) -> ExampleShards:
    """The examples of `world` with cross-fitted vectors beside them."""
    old = world.shards.take(np.arange(24))
    rows, users = list(range(24)), [f"u{row // 2}" for row in range(24)]
    examples = pa.table([rows, users, old.histories, old.items[:, 0]], schema=schema.EXAMPLES)
    negatives = pa.table([rows, list(old.items[:, 1:])], schema=schema.NEGATIVES)
    reference = pa.table([rows, list(old.items), list(old.reference)], schema=schema.REFERENCE)
    vectors = pa.table([rows, list(old.vector)], schema=schema.ROW_VECTORS)
    unseen = list(np.random.default_rng(3).normal(size=(24, 5)).astype(np.float32))
    crossfit = pa.table([rows, FOLDS, unseen], schema=schema.CROSSFIT_ROWS)
    met = met_in_training(pa.table([[0], ["u0"], [[1, 2]]], schema=schema.HISTORIES), examples)
    folder: Path = tmp_path_factory.mktemp("crossfitted")
    write_shards(folder, join_examples(examples, negatives, reference, vectors, met, crossfit))
    return ExampleShards(folder)


def _feed(world: Any, shards: ExampleShards, judges: Any, share: Share, **settings: Any) -> AlignFeed:
    return AlignFeed(
        shards, world.catalogue, world.item_vectors, ORDER, share, Objective(**settings), num_negatives=3, judges=judges
    )


def _whole(feed: AlignFeed, ranks: int, name: str, step: int = 2) -> np.ndarray:
    units = [feed.unit(step, rank) for rank in range(ranks)]
    places = np.concatenate([unit.arrays["place"] for unit in units])
    return np.concatenate([unit.arrays[name] for unit in units])[np.argsort(places)]


def test_confidence_is_a_percentile_within_the_model_of_the_borrowers_fold(
    world: Any, shards: ExampleShards, judges: list[torch.Tensor]
) -> None:
    rows = rows_of_step(ORDER, 2)
    examples = shards.take(rows)
    assert examples.judge_vector is not None
    sure = _whole(_feed(world, shards, judges, Share(1, 10**6)), 1, "confidence")
    for borrower, row in enumerate(rows.tolist()):
        scores = (judges[FOLDS[row]] @ torch.from_numpy(examples.judge_vector[borrower])).numpy()
        for owner in range(8):
            for n in range(3):
                own = scores[examples.items[owner, 1 + n]]
                # The catalogue is smaller than the sample, which is all of it then; the item itself is a tie.
                below = (scores < own).sum() + 0.5 * (scores == own).sum()
                assert sure[borrower, owner, n] == pytest.approx(0.5 - below / len(scores), abs=1e-6)


def test_who_may_borrow_and_the_margin_of_a_batch_are_of_the_model_of_all_users(
    world: Any, shards: ExampleShards, judges: list[torch.Tensor]
) -> None:
    share = Share(1, 10**6)
    with_folds, without = (
        _feed(world, *each, share, margin="batch") for each in ((shards, judges), (world.shards, ()))
    )
    for name in ("usable", "liking_sum", "reference"):
        np.testing.assert_array_equal(*(feed.unit(2, 0).arrays[name] for feed in (with_folds, without)))
    assert (_whole(with_folds, 1, "confidence") != _whole(without, 1, "confidence")).any()


@pytest.mark.parametrize("name", ["sdpo", "napo"])
def test_not_one_bit_of_it_depends_on_the_cut(
    world: Any, shards: ExampleShards, judges: list[torch.Tensor], name: str
) -> None:
    one = _whole(_feed(world, shards, judges, Share(1, 10**6), name=name), 1, "confidence")
    for share in (Share(2, 10**6), Share(3, 100), Share(8, 10**6)):
        found = _whole(_feed(world, shards, judges, share, name=name), share.world_size, "confidence")
        np.testing.assert_array_equal(found, one)


def test_examples_and_judges_go_together(world: Any, shards: ExampleShards, judges: list[torch.Tensor]) -> None:
    with pytest.raises(ValueError, match="cross-fitted: True; item vectors of 0 folds"):
        _feed(world, shards, (), Share(1, 10**6))
    with pytest.raises(ValueError, match="cross-fitted: False; item vectors of 2 folds"):
        _feed(world, world.shards, judges, Share(1, 10**6))
