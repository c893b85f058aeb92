"""A catalogue, rows and models out of nothing, so that every sampler of the registry can be asked to draw."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from recray.negatives.adaptive import Scores
from recray.negatives.in_batch import batches_of
from recray.negatives.lists import Targets
from recray.negatives.nearest import neighbours
from recray.negatives.same_category import genres_of
from recray.negatives.self_play import Pools

Known = Callable[..., dict[str, Any]]


@pytest.fixture
def known() -> Known:
    """Return what makes all that samplers may have to be told, for rows of these targets."""
    return _known


def _known(
    targets: np.ndarray, num_items: int = 40, *, rows: np.ndarray | None = None, seed: int = 0
) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    of_rows = Targets(np.arange(len(targets)) if rows is None else rows, np.asarray(targets))
    vectors = rng.normal(size=(num_items, 4))
    pools = np.argsort(rng.random((len(targets), num_items)), axis=1)[:, : num_items * 3 // 4]
    return {
        "num_items": num_items,
        "frequency": rng.integers(1, 50, size=num_items),
        "exponent": 1.0,
        "targets": of_rows,
        "batches": batches_of(of_rows, size=16, seed=seed),
        "target_frequency": np.bincount(targets, minlength=num_items) + 1,
        "uniform_share": 0.4,
        "candidates": 6,
        "scores": Scores(of_rows.rows, rng.normal(size=(len(targets), 4)), vectors),
        "genres": genres_of(np.arange(1, num_items), np.arange(1, num_items) % 5, num_items),  # item 0 has none
        "near": neighbours(vectors, first_rank=3, last_rank=12),
        "pools": Pools(of_rows.rows, pools, num_items),
        "top_k": num_items // 2,
    }
