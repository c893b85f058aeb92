"""Known false negatives, and what the guard keeps out, are counted as plain loops count them."""

from typing import Any

import numpy as np
import pytest

from recray.config import Objective
from recray.train.audit import THRESHOLDS, audit_guard, known_false_negatives
from recray.train.feeding import AlignFeed, Share
from recray.train.order import Order, rows_of_step

ORDER, STEPS = Order(num_rows=24, global_batch=6, seed=2), (0, 3)
NEAR = {"guard_near": "shrink", "guard_threshold": -0.1}


def feed_of(world: Any, objective: Objective) -> AlignFeed:
    return AlignFeed(
        world.shards, world.catalogue, world.item_vectors, ORDER, Share(1, 10**6), objective, num_negatives=3
    )


@pytest.fixture
def liked() -> list[np.ndarray]:
    """For each row, nine of the thirty items."""
    rng = np.random.default_rng(0)
    return [rng.permutation(30)[:9] for _ in range(24)]


@pytest.mark.parametrize(
    "objective",
    [
        Objective(margin_base=2.0, margin_slope=0.5),
        Objective(margin_base=2.0, margin_slope=0.5, **NEAR),
        Objective(reuse="item", reuse_items=5, sharing_fraction=0.3, margin_base=2.0, margin_slope=0.5, **NEAR),
        Objective(name="sdpo", reuse="item", reuse_items=5),
        Objective(name="dpo"),
    ],
    ids=["score", "shrunk", "item", "sdpo", "dpo"],
)
def test_counts_and_margins_are_those_of_plain_loops(world: Any, objective: Objective, liked: list[np.ndarray]) -> None:
    feed = feed_of(world, objective)
    own, borrowed, margins = [], [], {True: [], False: []}
    for step in STEPS:
        unit = feed.unit(step, 0)
        negatives, listed = world.shards.take(np.array(unit.rows)).items[:, 1:4], feed.listed(step)
        for entry, borrower in enumerate(unit.arrays["place"].tolist()):
            for owner, n in np.argwhere(unit.arrays["usable"][entry]).tolist():
                mine = owner == borrower if objective.shares_scores else n < 3
                item = negatives[owner, n] if objective.shares_scores else listed[borrower][1 + n]
                false = int(item) in set(liked[unit.rows[borrower]].tolist())
                (own if mine else borrowed).append(false)
                sure = unit.arrays["confidence"][entry, owner, n]
                asked = max(0.0, 2.0 * (1 + 0.5 * sure))
                if objective.guard_near == "shrink" and not mine and sure < -0.1:
                    asked *= (sure + 0.5) / 0.4
                margins[false].append(asked)
    found = known_false_negatives(feed, STEPS, liked)
    assert found["own_negatives_known_false"] == pytest.approx(np.mean(own))
    assert found["borrowed_negatives_known_false"] == pytest.approx(np.mean(borrowed) if borrowed else 0.0)
    assert found["borrowed_negatives_each"] == pytest.approx(len(borrowed) / 12)
    assert bool(borrowed) == (objective.name != "dpo")
    if objective.name == "napo":
        assert found["margin_on_known_false"] == pytest.approx(np.mean(margins[True]), rel=1e-6)
        assert found["margin_on_others"] == pytest.approx(np.mean(margins[False]), rel=1e-6)
    else:
        assert "margin_on_others" not in found


def pairs_in_loops(world: Any, feed: AlignFeed, liked: list[np.ndarray], users: int) -> list[dict[str, Any]]:
    """Every pair of a user and an item lent to it: whether it met, lies near to, and likes it."""
    found = []
    for step in STEPS:
        rows = rows_of_step(ORDER, step)
        examples = world.shards.take(rows)
        usable = feed_of(world, Objective(sharing_fraction=1.0, guard=False)).unit(step, 0)
        lends = usable.arrays["usable"][np.argsort(usable.arrays["place"])][:, :, 0]
        pool = np.unique(examples.items[:, 1:4])
        for place in range(users):
            lenders = [owner for owner in range(6) if lends[place, owner] and owner != place]
            offered = {int(item) for owner in lenders for item in examples.items[owner, 1:4]}
            if feed.objective.reuses_items:
                offered -= set(examples.items[place, :4].tolist())
            confidences = dict(zip(pool.tolist(), feed._sure(examples, np.array([place]), pool)[0], strict=True))
            for item in offered:
                met = item in examples.met[place] or item == examples.items[place, 0]
                likes = item in liked[rows[place]]
                found.append({"item": item, "met": met, "sure": confidences[item], "likes": likes and not met})
    return found


@pytest.mark.parametrize("reuse", ["score", "item"])
def test_what_is_guarded_is_what_plain_loops_find(world: Any, reuse: str, liked: list[np.ndarray]) -> None:
    objective = Objective(reuse=reuse, sharing_fraction=1.0, guard_near="mask", guard_threshold=-0.15)
    feed = feed_of(world, objective)
    facts, items = audit_guard(feed, STEPS, world.catalogue.labels, liked, users_a_step=4)
    pairs = pairs_in_loops(world, feed, liked, 4)
    unmet = [pair for pair in pairs if not pair["met"]]
    near = [pair for pair in unmet if pair["sure"] < -0.15]
    right = [pair for pair in near if pair["likes"]]
    wrong = [pair for pair in unmet if pair["likes"]]
    assert facts["lent_each"] == len(pairs) / 8
    assert facts["met"] == pytest.approx(1 - len(unmet) / len(pairs))
    assert facts["near"] == pytest.approx(len(near) / len(unmet))
    assert facts["known_false"] == pytest.approx(len(wrong) / len(unmet))
    assert facts["precision"] == pytest.approx(len(right) / len(near))
    assert facts["recall"] == pytest.approx(len(right) / len(wrong))
    assert facts["known_false_left"] == pytest.approx((len(wrong) - len(right)) / (len(unmet) - len(near)))
    assert [each["threshold"] for each in facts["by_threshold"]] == list(THRESHOLDS)
    assert facts["by_threshold"][-1]["near"] == pytest.approx(np.mean([pair["sure"] < 0 for pair in unmet]))
    guarded = [each["met"] + each["near"] for each in items]
    assert guarded == sorted(guarded, reverse=True)
    for each in items:
        own = [pair for pair in pairs if pair["item"] == each["item"]]
        assert each["label"] == world.catalogue.labels[each["item"]]
        assert each["lent"] == len(own)
        assert each["met"] == sum(pair["met"] for pair in own)
        assert each["near"] == sum(pair["sure"] < -0.15 for pair in own if not pair["met"])
        assert each["liked"] == sum(pair["likes"] for pair in own)
        assert each["right"] == sum(pair["likes"] for pair in own if pair["sure"] < -0.15)
    assert {pair["item"] for pair in pairs if pair["met"] or pair["sure"] < -0.15} == {each["item"] for each in items}


def test_without_known_truth_nothing_is_said_of_being_right(world: Any) -> None:
    facts, items = audit_guard(feed_of(world, Objective()), STEPS, world.catalogue.labels, None)
    assert {"lent_each", "met", "near", "by_threshold"} <= facts.keys()
    assert not {"precision", "recall", "known_false"} & (facts.keys() | facts["by_threshold"][0].keys())
    assert items
    assert items[0].keys() == {"item", "label", "lent", "met", "near"}
