"""Known false negatives are counted as plain loops count them."""

from typing import Any

import numpy as np
import pytest

from recray.config import Objective
from recray.train.audit import known_false_negatives
from recray.train.feeding import AlignFeed, Share
from recray.train.order import Order


def test_counts_and_margins_are_those_of_plain_loops(world: Any) -> None:
    order = Order(num_rows=24, global_batch=6, seed=2)
    feed = AlignFeed(
        world.shards, world.catalogue, world.item_vectors, order, Share(1, 10**6), Objective(), num_negatives=3
    )
    rng = np.random.default_rng(0)
    liked = [rng.permutation(30)[:9] for _ in range(24)]
    own, borrowed, margins = [], [], {True: [], False: []}
    for step in (0, 3):
        unit = feed.unit(step, 0)
        negatives = world.shards.take(np.array(unit.rows)).items[:, 1:4]
        for entry, borrower in enumerate(unit.arrays["place"].tolist()):
            for owner in range(6):
                for n in range(3):
                    if not unit.arrays["usable"][entry, owner, n]:
                        continue
                    false = int(negatives[owner, n]) in set(liked[unit.rows[borrower]].tolist())
                    (own if owner == borrower else borrowed).append(false)
                    margins[false].append(max(0.0, 2.0 * (1 + 0.5 * unit.arrays["confidence"][entry, owner, n])))
    found = known_false_negatives(feed, (0, 3), liked, base=2.0, slope=0.5)
    assert found["own_negatives_known_false"] == pytest.approx(np.mean(own))
    assert found["borrowed_negatives_known_false"] == pytest.approx(np.mean(borrowed))
    assert found["borrowed_negatives_each"] == pytest.approx(len(borrowed) / 12)
    assert found["margin_on_known_false"] == pytest.approx(np.mean(margins[True]), rel=1e-6)
    assert found["margin_on_others"] == pytest.approx(np.mean(margins[False]), rel=1e-6)
