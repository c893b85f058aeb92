"""Fitting SASRec: it learns, stops, repeats itself, and doesn't care how many ranks there are."""

import json
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch

from recray.config import Users
from recray.errors import DataError, ModelError
from recray.negatives.same_category import genres_of
from recray.ranking.metrics import ndcg, ranks
from recray.train.order import Order, rows_of_step
from recray.users import fit as fitting
from recray.users import own_lists
from recray.users.fit import Validation, batch_of, fit, shuffled, validated
from recray.users.ragged import from_lengths, padded, take, windows
from recray.users.sasrec import SASRec, Shape, load
from tests.processes import run_together
from tests.users import walks

SHAPE = Shape(walks.NUM_ITEMS, dim=16, layers=1, heads=2, max_history=8, dropout=0.1)

SHARED = {"sampled_negatives": 64}
OF_SAMPLERS = {
    "nearest": {"nearest_from": 1, "nearest_to": 40, "listed": 20},
    "self_play": {"hardest": 10},
    "top_k_stochastic": {"top_k": 30, "listed": 10},
}


def _settings(**changes: Any) -> Users:
    return Users(**{"global_batch": 16, "learning_rate": 1e-2, "passes": 12, "dropout": 0.1, **changes})


@pytest.mark.parametrize(
    "sampler", ["", "popularity", "in_batch", "adaptive_mixed", "nearest", "self_play", "top_k_stochastic"]
)
def test_learns_a_rule_that_popularity_can_not(sampler: str) -> None:
    histories, validation = walks.histories_and_validation()
    model = SASRec(SHAPE, seed=0)
    lines: list[dict[str, Any]] = []
    sampled = {"loss": "sampled_softmax", "sampler": sampler, **OF_SAMPLERS.get(sampler, SHARED)} if sampler else {}
    curve = fit(model, histories, validation, _settings(**sampled), seed=0, report=lines.append)
    assert lines == curve
    candidates, valid = padded(validation.candidates)
    frequency = np.bincount(histories.items, minlength=walks.NUM_ITEMS).astype(float)
    target = ((candidates == validation.targets[:, None]) & valid).argmax(axis=1)
    popularity = ndcg(ranks(frequency[candidates], target, valid), 10).mean()
    best = max(line["validation_ndcg@10"] for line in curve)
    assert best > popularity + 0.4
    # What is left in the model is the best pass, not the last.
    assert validated(model, validation)[1] == pytest.approx(best)
    assert curve[curve[-1]["best_pass"] - 1]["validation_ndcg@10"] == best


def test_stops_when_validation_no_longer_improves(monkeypatch: pytest.MonkeyPatch) -> None:
    histories, validation = walks.histories_and_validation(20)
    gains = iter([0.1, 0.3, 0.2, 0.3, 0.9])
    monkeypatch.setattr(fitting, "validated", lambda *_: (0.0, next(gains)))
    curve = fit(SASRec(SHAPE, seed=0), histories, validation, _settings(patience=2), seed=0, report=lambda _: None)
    assert [line["best_pass"] for line in curve] == [1, 2, 2, 2]


def test_the_same_seed_gives_the_same_weights_and_leaves_torch_alone() -> None:
    histories, validation = walks.histories_and_validation(30)
    found = []
    for ambient, seed in ((5, 1), (6, 1), (6, 2)):
        torch.manual_seed(ambient)
        model = SASRec(SHAPE, seed=0)
        before = torch.get_rng_state()
        fit(model, histories, validation, _settings(passes=2), seed=seed, report=lambda _: None)
        assert torch.equal(torch.get_rng_state(), before)
        found.append(model.items.weight.detach().clone())
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


@pytest.mark.parametrize("sampler", ["", "popularity", " unseen"])
def test_two_ranks_are_one(tmp_path: Path, sampler: str) -> None:
    commands = [
        [rank, world, tmp_path / f"store-{world}", tmp_path / f"out-{world}", sampler]
        for world in (1, 2)
        for rank in range(world)
    ]
    run_together(Path(__file__).with_name("fit_worker.py"), commands, tmp_path / "printed")
    one, two = load(tmp_path / "out-1"), load(tmp_path / "out-2")
    for (name, a), b in zip(one.named_parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=2e-4, rtol=1e-3, msg=lambda text, name=name: f"{name}: {text}")
    curves = [json.loads((tmp_path / f"out-{world}" / "curve.json").read_text()) for world in (1, 2)]
    for a, b in zip(*curves, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-5)
        assert b["validation_ndcg@10"] == pytest.approx(a["validation_ndcg@10"], abs=1e-3)


@pytest.mark.parametrize("sampler", get_args(Users.model_fields["sampler"].annotation))
def test_the_loss_of_a_batch_is_the_sum_over_its_ranks(sampler: str) -> None:
    histories, _ = walks.histories_and_validation(20)
    shared = {} if sampler in own_lists.SAMPLERS else {"sampled_negatives": 16}
    hard = {"hardest": 5} if sampler.startswith("adaptive") else {}
    settings = _settings(loss="sampled_softmax", sampler=sampler, global_batch=9, **shared, **hard)
    genres = genres_of(np.arange(walks.NUM_ITEMS), np.arange(walks.NUM_ITEMS) % 3, walks.NUM_ITEMS)
    trainer = fitting._Trainer(SASRec(SHAPE, seed=0).eval(), histories, settings, 0, genres)
    mine = rows_of_step(trainer.order, 2)
    whole, targets = trainer.loss(mine, 2)
    shares = [trainer.loss(mine[rank::4], 2) for rank in range(4)]
    torch.testing.assert_close(sum(loss for loss, _ in shares), whole)
    assert sum(count for _, count in shares) == targets


def test_ranks_share_a_batch_without_overlap(monkeypatch: pytest.MonkeyPatch) -> None:
    histories, validation = walks.histories_and_validation(10)
    rows: list[int] = []
    monkeypatch.setattr(fitting, "take", lambda lists, chosen: rows.extend(chosen) or take(lists, chosen))
    monkeypatch.setattr(fitting, "validated", lambda *_: (0.0, 0.0))
    every = windows(histories, SHAPE.max_history + 1).num_lists
    for rank in range(3):
        monkeypatch.setattr(fitting, "world", lambda rank=rank: (rank, 3))
        fit(SASRec(SHAPE, seed=0), histories, validation, _settings(passes=1, global_batch=every), seed=0, report=print)
    assert sorted(rows) == list(range(every))


def test_every_item_is_predicted_from_the_items_before_it() -> None:
    histories = from_lengths(np.array([5, 6, 7, 8, 9], dtype=np.int32), np.array([3, 2]))
    batch = batch_of(histories, torch.device("cpu"))
    assert batch.lengths.tolist() == [2, 1]
    assert batch.inputs[0].tolist() == [5, 6]
    assert batch.inputs[1, :1].tolist() == [8]  # the last item of a window is a target only
    assert batch.targets.tolist() == [5, 6, 7, 8, 9]
    assert batch.around.tolist() == [[5, 6, 7]] * 3 + [[8, 9, 8]] * 2
    model = SASRec(SHAPE, seed=0).eval()
    states = model(batch.inputs, batch.lengths).flatten(0, 1)[batch.tokens]
    alone = [([5, 6, 7], 0), ([5, 6, 7], 1), ([5, 6, 7], 2), ([8, 9], 0), ([8, 9], 1)]
    for state, (items, seen) in zip(states, alone, strict=True):
        inputs = torch.tensor([items[:-1]])
        torch.testing.assert_close(state, model(inputs, torch.tensor([len(items) - 1]))[0, seen])


def test_validation_in_plain_loops() -> None:
    _, validation = walks.histories_and_validation(25)
    model = SASRec(SHAPE, seed=0).eval()
    with torch.no_grad():
        model.items.weight.mul_(30)
    hits, gains = [], []
    for row, target in enumerate(validation.targets):
        history = validation.histories.items[validation.histories.offsets[row] : validation.histories.offsets[row + 1]]
        own = validation.candidates.items[validation.candidates.offsets[row] : validation.candidates.offsets[row + 1]]
        kept = torch.tensor(history[-8:].astype(np.int64))[None]
        state = model(kept, torch.tensor([kept.shape[1]]))[0, -1]
        scores = (model.items.weight @ state).detach().numpy()
        rank = 1 + sum(scores[item] >= scores[target] for item in own if item != target)
        hits.append(rank <= 10)
        gains.append(1 / np.log2(1 + rank) if rank <= 10 else 0.0)
    assert validated(model, validation, rows_at_once=7) == pytest.approx((np.mean(hits), np.mean(gains)))


@pytest.mark.parametrize("share", [0.25, 1.0])
def test_so_many_histories_are_shuffled_others_in_every_pass(share: float) -> None:
    lengths = np.random.default_rng(0).integers(0, 40, 400)
    lists = from_lengths(np.arange(lengths.sum(), dtype=np.int32), lengths)
    long = np.flatnonzero(lengths > 5)
    moved = []
    for number in range(1, 9):
        found = shuffled(lists, share, (3, number))
        assert (found.lengths == lengths).all()
        pairs = [
            (lists.items[a:b], found.items[a:b]) for a, b in zip(lists.offsets[:-1], lists.offsets[1:], strict=True)
        ]
        assert all(sorted(own) == sorted(other) for own, other in pairs)
        moved.append([(pairs[row][0] != pairs[row][1]).any() for row in long])
        again = shuffled(lists, share, (3, number))
        assert (again.items == found.items).all()
    shares = np.mean(moved, axis=1)
    assert shares == pytest.approx(share, abs=0.1)  # 4 standard errors of 350 histories
    assert len({tuple(own) for own in moved}) == (8 if share < 1 else 1)
    first = [shuffled(lists, 1.0, (seed, number)).items for seed, number in ((3, 1), (3, 2), (4, 1))]
    assert not any((first[a] == first[b]).all() for a, b in ((0, 1), (0, 2), (1, 2)))


def test_every_pass_learns_from_shuffles_of_its_own_and_keeps_every_target(monkeypatch: pytest.MonkeyPatch) -> None:
    histories, validation = walks.histories_and_validation(20)
    seen: list[np.ndarray] = []
    take_step = fitting._Trainer.loss

    def watched(trainer: Any, mine: np.ndarray, step: int) -> Any:
        seen.append(take(trainer.rows, mine).items)
        return take_step(trainer, mine, step)

    monkeypatch.setattr(fitting._Trainer, "loss", watched)
    every = windows(histories, SHAPE.max_history + 1).num_lists
    settings = _settings(shuffled=1.0, passes=3, global_batch=every)
    fit(SASRec(SHAPE, seed=0), histories, validation, settings, seed=0, report=lambda _: None)
    assert len(seen) == 3
    for number, items in enumerate(seen, 1):
        assert (np.sort(items) == np.sort(histories.items)).all()
        rows = rows_of_step(Order(every, every, 0), number - 1)
        expected = windows(shuffled(histories, 1.0, (0, number)), SHAPE.max_history + 1)
        assert (items == take(expected, rows).items).all()


def test_nothing_to_learn_from_is_refused() -> None:
    histories, validation = walks.histories_and_validation(3)
    none = from_lengths(np.empty(0, dtype=np.int32), np.empty(0, dtype=np.int64))
    with pytest.raises(DataError, match="got 0 items"):
        fit(SASRec(SHAPE, seed=0), none, validation, _settings(), seed=0, report=lambda _: None)
    empty = Validation(none, none, np.empty(0, dtype=np.int32))
    with pytest.raises(DataError, match="0 validation rows"):
        fit(SASRec(SHAPE, seed=0), histories, empty, _settings(), seed=0, report=lambda _: None)


def test_a_fit_that_blows_up_says_so() -> None:
    histories, validation = walks.histories_and_validation(10)
    model = SASRec(SHAPE, seed=0)
    with torch.no_grad():
        model.items.weight[3] = torch.inf
    with pytest.raises(ModelError, match="lower users.learning_rate"):
        fit(model, histories, validation, _settings(), seed=0, report=lambda _: None)
