"""Negatives that each of SASRec's targets has of its own: which they are, and that ranks and chunks change nothing."""

from typing import Any

import numpy as np
import pytest
import torch

from recray.config import Users
from recray.errors import DataError
from recray.negatives.same_category import Genres, genres_of
from recray.users import own_lists
from recray.users.losses import full_softmax, listed_softmax
from recray.users.own_lists import SAMPLERS, lists_of, ranked

ITEMS, DIM, TARGETS = 40, 5, 12


def settings(sampler: str, **changes: Any) -> Users:
    return Users(loss="sampled_softmax", sampler=sampler, **changes)


def genres() -> Genres:
    """Item i has genre i mod 4, a third of all genre 4 too, and items of 36 and above none."""
    pairs = [(item, item % 4) for item in range(36)] + [(item, 4) for item in range(0, 36, 3)]
    items, named = np.array(sorted(pairs)).T
    return genres_of(items, named, ITEMS)


def problem() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """States, item vectors, targets, and windows of three items with the target in their middle."""
    rng = np.random.default_rng(0)
    states, items = (torch.from_numpy(rng.normal(size=(rows, DIM)).astype(np.float32)) for rows in (TARGETS, ITEMS))
    windows = torch.from_numpy(np.stack([rng.permutation(ITEMS)[:3] for _ in range(TARGETS)]))
    return states, items, windows[:, 1], windows


def test_self_play_lists_the_best_outside_the_window_in_plain_loops() -> None:
    states, items, targets, windows = problem()
    lists = lists_of(settings("self_play", hardest=6), ITEMS, None)
    found, usable = lists.of(states, items, targets, windows, seed=0, step=3)
    assert bool(usable.all())
    for state, window, own in zip(states, windows.tolist(), found.tolist(), strict=True):
        scores = {item: float(state @ items[item]) for item in range(ITEMS) if item not in window}
        assert own == sorted(scores, key=lambda item: -scores[item])[:6]


def test_stochastic_ones_are_of_the_best_and_change_with_the_step() -> None:
    states, items, targets, windows = problem()
    best, _ = lists_of(settings("self_play", hardest=9), ITEMS, None).of(
        states, items, targets, windows, seed=0, step=0
    )
    drawing = lists_of(settings("top_k_stochastic", top_k=9, listed=3), ITEMS, None)
    drawn = torch.zeros(9)
    for step in range(600):
        found, _ = drawing.of(states, items, targets, windows, seed=0, step=step)
        places = (found[0][:, None] == best[0]).nonzero()[:, 1]
        assert len(places.unique()) == 3  # different ones, all of the best nine
        drawn[places] += 1
        if step == 1:
            assert not torch.equal(found, drawing.of(states, items, targets, windows, seed=0, step=0)[0])
            assert not torch.equal(found, drawing.of(states, items, targets, windows, seed=1, step=1)[0])
            assert torch.equal(found, drawing.of(states, items, targets, windows, seed=0, step=1)[0])
    # Each place has chance 3/9: four standard deviations of 600 draws.
    assert (drawn / 600 - 1 / 3).abs().max() < 4 * (2 / 9 / 600) ** 0.5


def test_nearest_ones_are_at_these_ranks_of_the_cosine() -> None:
    states, items, targets, windows = problem()
    lists = lists_of(settings("nearest", nearest_from=3, nearest_to=7, listed=5), ITEMS, None)
    found, usable = lists.of(states, items, targets, windows, seed=0, step=0)
    units = items / items.norm(dim=1, keepdim=True)
    for target, window, own, counts in zip(
        targets.tolist(), windows.tolist(), found.tolist(), usable.tolist(), strict=True
    ):
        cosines = {item: float(units[target] @ units[item]) for item in range(ITEMS) if item != target}
        assert own == sorted(cosines, key=lambda item: -cosines[item])[2:7]
        assert counts == [item not in window for item in own]


def test_those_of_the_category_share_a_genre_all_alike_and_any_item_stands_in_where_there_is_none() -> None:
    states, items, _, _ = problem()
    targets = torch.tensor([0, 5, 38] * 4)
    windows = targets[:, None]
    lists = lists_of(settings("same_category", listed=2000), ITEMS, genres())
    found, usable = lists.of(states, items, targets, windows, seed=0, step=0)
    sharing = ({*range(0, 36, 3), *range(0, 36, 4)}, {*range(1, 36, 4)}, {*range(ITEMS)})
    for own, wanted in zip(found[:3], sharing, strict=True):
        shares = np.bincount(own.numpy(), minlength=ITEMS) / len(own)
        assert set(np.flatnonzero(shares).tolist()) == wanted
        chance = 1 / len(wanted)
        assert np.abs(shares[sorted(wanted)] - chance).max() < 4 * (chance * (1 - chance) / len(own)) ** 0.5
    assert torch.equal(usable, found != targets[:, None])


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_lists_do_not_depend_on_which_targets_stand_beside_or_on_chunks(
    sampler: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    states, items, targets, windows = problem()
    lists = lists_of(settings(sampler), ITEMS, genres())
    whole = lists.of(states, items, targets, windows, seed=0, step=5)
    monkeypatch.setattr(own_lists, "SCORES_AT_ONCE", 2 * ITEMS)
    halves = [
        lists.of(states[part], items, targets[part], windows[part], seed=0, step=5)
        for part in (slice(0, 5), slice(5, None))
    ]
    for one, pieces in zip(whole, zip(*halves, strict=True), strict=True):
        assert torch.equal(one, torch.cat(pieces))


def test_what_the_catalogue_lacks_is_refused_or_left_out() -> None:
    states, items, targets, windows = problem()
    found, usable = lists_of(settings("self_play", hardest=64), ITEMS, None).of(
        states, items, targets, windows, seed=0, step=0
    )
    assert found.shape == (TARGETS, ITEMS - 1)
    # The two others of the window come last, and do not count.
    assert usable.sum(dim=1).tolist() == [ITEMS - 3] * TARGETS
    with pytest.raises(DataError, match="ranks 41 to 60, but there are 40 items"):
        lists_of(settings("nearest", nearest_from=41, nearest_to=60), ITEMS, None)
    for nothing in (None, genres_of(np.zeros(0, np.int64), np.zeros(0, np.int64), ITEMS)):
        with pytest.raises(DataError, match=r"no item of the catalogue has genres; .*ingest\.columns\.genres"):
            lists_of(settings("same_category"), ITEMS, nothing)
    with pytest.raises(ValueError, match="uniform has no lists"):
        lists_of(settings("uniform"), ITEMS, None)


def test_ranked_puts_barred_items_last() -> None:
    items = torch.eye(4)[:, :2] + torch.tensor([[0.0], [0.0], [0.5], [0.2]])
    found = ranked(torch.tensor([[1.0, 0.0]]), items, torch.tensor([[0, 0]]), range(1, 5))
    assert found.tolist() == [[2, 3, 1, 0]]


def test_listed_softmax_by_hand_and_with_all_items_the_full_one() -> None:
    states, items, targets, _ = problem()
    others = torch.stack([torch.tensor([item for item in range(ITEMS) if item != target]) for target in targets])
    everything = torch.ones_like(others, dtype=torch.bool)
    for tensor in (states, items):
        tensor.requires_grad_(True)
    listed = listed_softmax(states, items, targets, others, everything)
    full = full_softmax(states, items, targets)
    torch.testing.assert_close(listed, full)
    torch.testing.assert_close(torch.autograd.grad(listed, (states, items)), torch.autograd.grad(full, (states, items)))
    by_hand = listed_softmax(
        torch.tensor([[1.0]]),
        torch.tensor([[2.0], [3.0], [9.0]]),
        torch.tensor([0]),
        torch.tensor([[1, 2]]),
        torch.tensor([[True, False]]),
    )
    assert by_hand.item() == pytest.approx(np.log(1 + np.e))


def test_a_target_without_negatives_has_no_loss_and_no_gradient() -> None:
    states, items, targets, windows = problem()
    items.requires_grad_(True)
    nothing = torch.zeros(TARGETS, 3, dtype=torch.bool)
    loss = listed_softmax(states, items, targets, windows, nothing)
    (grad,) = torch.autograd.grad(loss, items)
    assert loss.item() == 0
    assert not grad.any()
    # And one that is not usable gets none, whatever it scores.
    usable = windows != targets[:, None]
    (grad,) = torch.autograd.grad(listed_softmax(states, items, targets, windows, usable), items)
    touched = set(grad.abs().sum(dim=1).nonzero()[:, 0].tolist())
    assert touched == set(windows.flatten().tolist())
