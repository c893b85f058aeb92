"""Item reuse: borrowed items scored under the borrower's own prompt, against scoring each by itself."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from recray.config import Objective
from recray.data.catalogue import Catalogue
from recray.data.prompts import find_template
from recray.lm.layout import separate_layout
from recray.lm.scorer import segments_of, sum_by_slot, to_device
from recray.objectives.margins import confidence
from recray.objectives.registry import OBJECTIVES, lengthens
from recray.train.feeding import AlignFeed, Share
from recray.train.order import Order, rows_of_step
from recray.train.reference import scores_of_copy
from recray.train.step import AlignStep, MarginCentre
from recray.train.units import pack_unit, unpack_unit
from tests.train.test_step import Recorder, relative_error

ORDER = Order(num_rows=24, global_batch=9, seed=5)
WHOLE, CUTS = Share(1, 10**6), (Share(1, 10**6, 3), Share(2, 10**6), Share(3, 100))
FEW = {"reuse": "item", "sharing_fraction": 0.15, "reuse_items": 6}  # one lender each: four items at most


def reusing(**settings: Any) -> Objective:
    return Objective(**{"beta": 0.5, "reuse": "item", "reuse_items": 3} | settings)


def feed_of(world: Any, objective: Objective, share: Share = WHOLE, order: Order = ORDER) -> AlignFeed:
    return AlignFeed(world.shards, world.catalogue, world.item_vectors, order, share, objective, num_negatives=4)


def borrowed(feed: AlignFeed, step: int = 1) -> list[list[int]]:
    """What each user of a step borrows, in its order."""
    return [items[5:].tolist() for items in feed.listed(step)]


# -- what is borrowed ------------------------------------------------------------------------


def test_items_are_distinct_those_of_lenders_and_neither_own_nor_met(world: Any) -> None:
    rows = rows_of_step(ORDER, 1)
    examples = world.shards.take(rows)
    caught = 0
    for settings in ({"sharing_fraction": 1.0}, {"sharing": "threshold", "sharing_threshold": 0.0}, FEW):
        objective = reusing(**{"reuse_items": 30} | settings)
        unguarded = borrowed(feed_of(world, objective.model_copy(update={"guard": False})))
        lends = feed_of(world, objective)._lends(
            torch.from_numpy(examples.vector), torch.arange(9), torch.from_numpy(examples.user)
        )
        for place, items in enumerate(borrowed(feed_of(world, objective))):
            lenders = [owner for owner in range(9) if lends[place, owner] and owner != place]
            offered = {int(item) for owner in lenders for item in examples.items[owner, 1:5]}
            own, met = set(examples.items[place, :5].tolist()), set(examples.met[place].tolist())
            assert len(set(items)) == len(items)
            assert set(unguarded[place]) == (offered - own)
            assert set(items) == offered - own - met if settings is not FEW else set(items) <= offered - own - met
            caught += len(offered & met - own)
    assert caught > 0


def test_they_follow_from_seed_epoch_and_row_and_fewer_are_the_first_of_more(world: Any) -> None:
    several = {most: borrowed(feed_of(world, reusing(reuse_items=most))) for most in (1, 3, 8)}
    assert several[3] == borrowed(feed_of(world, reusing(reuse_items=3)))
    for most in (1, 3):
        assert several[most] == [items[:most] for items in several[8]]
    other = Order(24, 9, seed=6)
    assert borrowed(feed_of(world, reusing(), order=other)) != several[3]
    # The same rows together in the next epoch: another draw.
    every = Order(24, 24, seed=5)
    first, second = (
        {row: set(items) for row, items in zip(rows_of_step(every, step).tolist(), borrowed(feed, step), strict=True)}
        for feed in [feed_of(world, reusing(sharing_fraction=1.0), order=every)]
        for step in (0, 1)
    )
    assert sum(first[row] != second[row] for row in first) > 12


@pytest.mark.parametrize("share", CUTS)
def test_they_do_not_depend_on_how_the_batch_is_cut(world: Any, share: Share) -> None:
    one, cut = feed_of(world, reusing()), feed_of(world, reusing(), share)
    assert borrowed(cut) == borrowed(one)
    (whole,) = [one.unit(1, 0)]
    back = np.argsort(whole.arrays["place"])
    for rank in range(share.world_size):
        unit = cut.unit(1, rank)
        for name in ("usable", "confidence"):
            np.testing.assert_array_equal(unit.arrays[name], whole.arrays[name][back][unit.arrays["place"]])
        np.testing.assert_array_equal(unit.arrays["candidates_each"], whole.arrays["candidates_each"])


def test_a_confidence_is_the_borrowers_in_its_own_list(world: Any) -> None:
    feed = feed_of(world, reusing(**FEW))
    unit, listed = feed.unit(1, 0), feed.listed(1)
    vectors = torch.from_numpy(world.shards.take(rows_of_step(ORDER, 1)).vector)
    assert 0 < sum(len(items) - 5 for items in listed) < 9 * 6
    for row, place in enumerate(unit.arrays["place"].tolist()):
        negatives = listed[place][1:]
        sure = confidence(vectors[place : place + 1], world.item_vectors[negatives.astype(int)], feed._sample_vectors)
        np.testing.assert_array_equal(unit.arrays["confidence"][row, 0, : negatives.size], sure[0].numpy())
        assert unit.arrays["usable"][row, 0].tolist() == [number < negatives.size for number in range(10)]


@pytest.mark.parametrize("settings", [{}, FEW])
def test_what_it_costs_is_the_items_own_tokens(world: Any, settings: dict[str, Any]) -> None:
    objective = reusing(**settings)
    feed, plain = feed_of(world, objective), feed_of(world, Objective(name="sdpo"))
    tokens, without = (
        sum(int((micro.layout.segment >= 0).sum()) for micro in each.unit(1, 0).micro_batches) for each in (feed, plain)
    )
    items = np.concatenate([items[5:] for items in feed.listed(1)])
    assert tokens - without == (world.catalogue.item_lengths[items] - 1).sum() > 0  # its end predicts nothing


def test_a_prompt_that_lists_candidates_lists_what_is_borrowed(world: Any) -> None:
    template = find_template("instruction_candidates")
    listing = world._replace(catalogue=Catalogue.build(world.catalogue.labels, world.tokenizer, template, 600))
    feed = feed_of(listing, reusing())
    (micro,) = feed.unit(1, 0).micro_batches
    examples = world.shards.take(rows_of_step(ORDER, 1))
    for number, place in enumerate(micro.places.tolist()):
        inside = (micro.layout.segment == number) & (micro.layout.branch == 0)
        listed = feed.listed(1)[place]
        expected = listing.catalogue.prompt(examples.histories[place], np.sort(listed))
        np.testing.assert_array_equal(micro.layout.tokens[inside], expected)


# -- loss and gradient -----------------------------------------------------------------------


def each_by_itself(world: Any, scorer: Any, histories: list[np.ndarray], listed: list[np.ndarray]) -> list[Tensor]:
    """The score of every item of every user, each in a row of its own behind its own copy of the user's prompt."""
    packed = to_device(separate_layout(segments_of(world.catalogue, histories, listed)), "cpu")
    return list(sum_by_slot(scorer(packed), packed).split([items.size for items in listed]))


def in_plain_loops(world: Any, scorer: Any, feed: AlignFeed, objective: Objective) -> Tensor:
    """The mean loss of step 1: every item scored by itself under its user's prompt, added up one by one."""
    examples, listed, each = world.shards.take(rows_of_step(ORDER, 1)), feed.listed(1), []
    scores = each_by_itself(world, scorer, examples.histories, listed)
    for place, (items, score) in enumerate(zip(listed, scores, strict=True)):
        vectors = world.item_vectors[items[1:].astype(int)]
        sure = confidence(torch.from_numpy(examples.vector[place])[None], vectors, feed._sample_vectors)[0].double()
        gamma = objective.margin_base * (1 + objective.margin_slope * sure) if objective.name == "napo" else 0 * sure
        gaps = [objective.beta * (s - score[0]) + g for s, g in zip(score[1:], gamma, strict=True)]
        if objective.name == "bpr":
            each.append(sum((1 + gap.exp()).log() for gap in gaps) / len(gaps))
        else:
            each.append((1 + sum(gap.exp() for gap in gaps)).log())
    return sum(each) / len(each)  # type: ignore[no-any-return]


@pytest.mark.parametrize("share", [WHOLE, Share(1, 10**6, 3)])
@pytest.mark.parametrize("settings", [{}, FEW])
@pytest.mark.parametrize("name", ["napo", "sdpo", "bpr"])
def test_loss_and_gradient_are_those_of_scoring_each_item_by_itself(
    world: Any, name: str, settings: dict[str, Any], share: Share
) -> None:
    objective = reusing(name=name, **({} if name == "bpr" else {"reference": False}), **settings)
    engine = Recorder(world.scorer(torch.float64))
    feed = feed_of(world, objective, share)
    unit = unpack_unit(pack_unit(feed.unit(1, 0)))
    result = AlignStep(objective, MarginCentre())(engine, unit, learning_rate=0.0)
    scorer = world.scorer(torch.float64)
    loss = in_plain_loops(world, scorer, feed, objective)
    assert result.metrics["loss"] == pytest.approx(loss.item(), rel=1e-10)
    gradients = list(torch.autograd.grad(loss, list(scorer.parameters())))
    assert relative_error(engine.gradients, gradients) < 1e-6  # the model's norms are in float32
    assert result.metrics["usable_negatives"] == np.mean([items.size - 1 for items in feed.listed(1)])


@pytest.mark.parametrize("name", [name for name in OBJECTIVES if lengthens(name)])
def test_padding_reaches_neither_loss_nor_gradient_of_any_objective(world: Any, name: str) -> None:
    # Fewer items than there is room for: more room changes nothing, and what stands there does not matter.
    found = []
    for most, fill in ((4, 0.0), (9, 0.0), (9, -1e4)):
        objective = reusing(name=name, **FEW | {"reuse_items": most}, length_normalised=True)
        unit = feed_of(world, objective).unit(1, 0)
        each = torch.from_numpy(unit.arrays["candidates_each"])
        width = 5 + most
        there = torch.arange(width) < each[:, None]
        rng = torch.Generator().manual_seed(2)
        scores = torch.full((9, width), fill, dtype=torch.float64)
        scores[:, :9] = torch.where(there[:, :9], -30 * torch.rand(9, 9, generator=rng, dtype=torch.float64), fill)
        lengths = torch.where(there, 3.0, 1.0).double()
        with torch.autograd.set_detect_anomaly(True):
            step = AlignStep(objective, MarginCentre())._differentiate(scores, torch.zeros(9, width), unit, lengths)
        assert not step.grad[~there].any()
        assert int((~there).sum()) > 0
        found.append((step.metrics, step.grad[:, :9]))
    for metrics, gradient in found[1:]:
        assert metrics == pytest.approx(found[0][0], rel=1e-12)
        torch.testing.assert_close(gradient, found[0][1], rtol=1e-12, atol=0)


def test_a_reference_that_is_scored_in_training_scores_borrowed_items_too(world: Any) -> None:
    objective = reusing(**FEW)
    unit = feed_of(world, objective).unit(1, 0)
    engine = Recorder(world.scorer(torch.float64))
    step = AlignStep(objective, MarginCentre(), scores_of_copy(world.scorer(torch.float64)))
    metrics = step(engine, unit, learning_rate=0.0).metrics
    # Policy and reference agree: every log-ratio is 0, and only the margins are left.
    sure, usable = (unit.arrays[name][:, 0] for name in ("confidence", "usable"))
    expected = np.log1p((np.exp(1 + 0.3 * sure.astype(float)) * usable).sum(axis=1)).mean()
    assert metrics["loss"] == pytest.approx(expected, rel=1e-6)


def test_the_batch_margin_is_the_mean_over_own_and_borrowed(world: Any) -> None:
    objective = reusing(margin="batch", **FEW)
    feed = feed_of(world, objective)
    vectors = world.shards.take(rows_of_step(ORDER, 1)).vector
    liking = [
        vectors[place] @ world.item_vectors[items[1:].astype(int)].numpy().T
        for place, items in enumerate(feed.listed(1))
    ]
    assert feed.unit(1, 0).arrays["liking_sum"][0] == pytest.approx(np.concatenate(liking).sum(), rel=1e-5)
