"""Fitting SASRec: the same batches, losses and gradients on one rank and on many.

Axes:
    R  rows of a global batch, each a window of a history
    V  validation rows
    D  width of states and item vectors
"""

import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy import ndarray
from torch import Tensor

from recray.config import Users
from recray.distributed.collectives import sum_over_ranks, world
from recray.errors import DataError, ModelError
from recray.negatives.same_category import Genres
from recray.ranking.metrics import hit_rate, ndcg, ranks
from recray.train.order import Order, rows_of_step
from recray.users.losses import full_softmax, hardest_softmax, listed_softmax, sampled_softmax
from recray.users.own_lists import SAMPLERS as OF_ITS_OWN
from recray.users.own_lists import Lists, lists_of
from recray.users.ragged import Ragged, from_lengths, padded, take, windows
from recray.users.sampling import HARDEST, proposal
from recray.users.sasrec import SASRec, user_vectors

logger = logging.getLogger(__name__)

Report = Callable[[dict[str, Any]], None]
RANKED_TO = 10


@dataclass(frozen=True)
class Validation:
    """Rows to rank: the target is among the candidates of its row."""

    histories: Ragged
    candidates: Ragged
    targets: Int[ndarray, " V"]


class Batch(NamedTuple):
    """Windows of one rank, and what is to be predicted after each of their items."""

    inputs: Int[Tensor, "R L"]
    lengths: Int[Tensor, " R"]
    tokens: Int[Tensor, " T"]  # places in the flattened states
    targets: Int[Tensor, " T"]
    windows: Int[Tensor, "R L1"]  # inputs and the last item; a short one repeats its first

    @property
    def around(self) -> Int[Tensor, "T L1"]:
        """The items of each target's window."""
        return self.windows[self.tokens // self.windows.shape[1]]


def fit(
    model: SASRec,
    histories: Ragged,
    validation: Validation,
    settings: Users,
    *,
    seed: int,
    report: Report,
    genres: Genres | None = None,
) -> list[dict[str, Any]]:
    """Fit `model` in place, leave it with the weights of its best pass, and return the curve, one dict a pass.

    Histories are cut into windows of `max_history` + 1 items, so that every item of every history is a target once
    a pass; a share `settings.shuffled` of them, others in every pass, in a random order. A global batch is
    `rows_of_step` of the windows; each rank takes its share, and the gradient is that of the loss summed over the
    global batch, divided by the targets in it: at dropout 0 it does not depend on the number of ranks. Passes end when
    `patience` of them in a row brought no better validation NDCG@10.

    Args:
        model: its weights are replaced; every rank must start with the same ones.
        histories: training histories, in time order.
        validation: the same rows on every rank.
        settings: loss, batch, shuffles, optimiser and patience.
        seed: of the order of batches, the shuffles, the sampled negatives and dropout.
        report: called with each pass's line, on every rank, equally often.
        genres: of the items; for negatives of the same category.

    Raises:
        DataError: if there is nothing to learn from or to validate on, or the catalogue lacks what the sampler draws.
        ModelError: if the loss is no longer finite.
    """
    if not histories.lengths.any() or validation.histories.num_lists == 0:
        raise DataError(
            f"SASRec needs training histories and validation rows, got {histories.lengths.sum()} items and "
            f"{validation.histories.num_lists} validation rows; the split leaves too little"
        )
    trainer = _Trainer(model, histories, settings, seed, genres)
    curve: list[dict[str, Any]] = []
    best = _Best(-math.inf, 0, _copy(model))
    devices = [model.start.device] if model.start.is_cuda else []
    with torch.random.fork_rng(devices=devices):
        for number in range(1, settings.passes + 1):
            started = time.monotonic()
            loss = trainer.one_pass(number)
            hit, gain = validated(model, validation)
            if gain > best.gain:
                best = _Best(gain, number, _copy(model))
            scores = {f"validation_ndcg@{RANKED_TO}": gain, f"validation_hr@{RANKED_TO}": hit}
            line = {"pass": number, "step": number * trainer.steps, "loss": loss, **scores, "best_pass": best.number}
            curve.append({**line, "seconds": round(time.monotonic() - started, 3)})
            report(curve[-1])
            if number - best.number >= settings.patience:
                logger.info("stops: %d passes without a better NDCG@%d", settings.patience, RANKED_TO)
                break
    model.load_state_dict(best.weights)
    model.eval()
    return curve


class _Best(NamedTuple):
    """The pass that validated best."""

    gain: float
    number: int
    weights: dict[str, Tensor]


class _Trainer:
    """One rank's steps."""

    def __init__(
        self, model: SASRec, histories: Ragged, settings: Users, seed: int, genres: Genres | None = None
    ) -> None:
        self.model, self.histories, self.settings, self.seed = model, histories, settings, seed
        self.width = model.shape.max_history + 1
        self.rows = windows(histories, self.width)
        self.order = Order(self.rows.num_lists, settings.global_batch, seed)
        self.steps = math.ceil(self.order.steps_per_epoch)
        self.parameters = list(model.parameters())
        self.optimiser = torch.optim.AdamW(
            self.parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay
        )
        self.lists: Lists | None = None
        if settings.loss == "sampled_softmax" and settings.sampler in OF_ITS_OWN:
            self.lists = lists_of(settings, model.shape.num_items, genres)
        else:
            self.proposal = proposal(
                settings.sampler,
                np.bincount(self.rows.items, minlength=model.shape.num_items),
                settings.sampled_negatives,
                exponent=settings.exponent,
                uniform_share=settings.uniform_share,
            )

    def one_pass(self, number: int) -> float:
        """Take the steps of this pass, counted from 1, and return the mean loss of a target, in nats."""
        if self.settings.shuffled:
            self.rows = windows(shuffled(self.histories, self.settings.shuffled, (self.seed, number)), self.width)
        self.model.train()
        total = torch.zeros(2, dtype=torch.float64)
        for step in range((number - 1) * self.steps, number * self.steps):
            total += self.step(step)
        loss = float(total[0] / total[1])
        if not math.isfinite(loss):
            raise ModelError(
                f"SASRec's loss is {loss} in pass {number}; lower users.learning_rate "
                f"(now {self.settings.learning_rate})"
            )
        return loss

    def step(self, step: int) -> Float[Tensor, " 2"]:
        """Take one step and return the global batch's (summed loss, number of targets)."""
        rank, size = world()
        mine = rows_of_step(self.order, step)[rank::size]
        torch.manual_seed(_seed_of(self.seed, step, rank))
        self.optimiser.zero_grad()
        loss, count = self.loss(mine, step)
        if count:
            loss.backward()  # type: ignore[no-untyped-call]
        total = self.reduced(loss, count)
        self.optimiser.step()
        return total

    def loss(self, mine: Int[ndarray, " r"], step: int) -> tuple[Float[Tensor, ""], int]:
        """Return the summed loss of these windows, and how many targets they hold."""
        device = self.model.start.device
        if len(mine) == 0:
            return torch.zeros((), device=device), 0
        batch = batch_of(take(self.rows, mine), device)
        states = self.model(batch.inputs, batch.lengths).flatten(0, 1)[batch.tokens]
        table = self.model.items.weight
        if self.settings.loss == "full_softmax":
            return full_softmax(states, table, batch.targets), len(batch.targets)
        if self.lists is None:
            return self.sampled(states, table, batch.targets, step), len(batch.targets)
        own = self.lists.of(states, table, batch.targets, batch.around, seed=self.seed, step=step)
        return listed_softmax(states, table, batch.targets, *own), len(batch.targets)

    def sampled(
        self, states: Float[Tensor, "T D"], table: Float[Tensor, "I D"], targets: Int[Tensor, " T"], step: int
    ) -> Float[Tensor, ""]:
        """Return the summed loss of these targets against the negatives of the step, the same on every rank."""
        everyone = rows_of_step(self.order, step) if self.proposal.from_batch else np.empty(0, dtype=np.int64)
        drawn, expected = self.proposal.drawn(take(self.rows, everyone).items, seed=self.seed, step=step)
        if self.settings.sampler in HARDEST:
            different = torch.from_numpy(np.unique(drawn)).to(table.device)
            return hardest_softmax(states, table, targets, different, self.settings.hardest)
        negatives, log_expected = (torch.from_numpy(each).to(table.device) for each in (drawn, expected))
        return sampled_softmax(states, table, targets, negatives, log_expected)

    def reduced(self, loss: Float[Tensor, ""], count: int) -> Float[Tensor, " 2"]:
        """Put the global batch's mean gradient into the parameters; return its (summed loss, number of targets)."""
        ends = torch.stack([loss.detach().float(), torch.tensor(float(count), device=loss.device)])
        pieces = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
        total = sum_over_ranks(torch.cat([*(piece.flatten() for piece in pieces), ends]))
        grads = torch.split(total[:-2] / total[-1], [p.numel() for p in self.parameters])
        for parameter, grad in zip(self.parameters, grads, strict=True):
            parameter.grad = grad.view_as(parameter)
        return total[-2:].double().cpu()


def shuffled(histories: Ragged, share: float, key: tuple[int, int]) -> Ragged:
    """Return the histories, about a share of them in a random order; which ones, and how, follows from (seed, pass).

    Lists keep their lengths, so that every pass has as many windows.
    """
    seed, number = key
    # A spawn key, so that no other generator that is seeded by these two numbers draws the same.
    generator = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(number,)))
    moved = generator.random(histories.num_lists) < share
    owner = np.repeat(np.arange(histories.num_lists), histories.lengths)
    place = np.where(moved[owner], generator.permutation(len(owner)), np.arange(len(owner)))
    items = histories.items[histories.offsets[0] : histories.offsets[-1]]
    return from_lengths(items[np.lexsort((place, owner))], histories.lengths)


def batch_of(rows: Ragged, device: torch.device) -> Batch:
    """Return windows as tensors: every item is a target, and the input of those that follow it."""
    items, valid = padded(rows)
    every = torch.from_numpy(items).to(device)
    tokens = torch.from_numpy(np.flatnonzero(valid)).to(device)
    lengths = torch.from_numpy(rows.lengths - 1).to(device)
    # The model puts its start first, so its state at a place is the one before that place's item.
    held = torch.where(torch.from_numpy(valid).to(device), every, every[:, :1])
    return Batch(every[:, :-1], lengths, tokens, every.flatten()[tokens], held)


def validated(model: SASRec, validation: Validation, *, rows_at_once: int = 512) -> tuple[float, float]:
    """Return (HR@10, NDCG@10) over the candidates, each rank scoring its share of the rows."""
    rank, size = world()
    mine = np.arange(rank, validation.histories.num_lists, size)
    table = model.items.weight.detach().float().cpu().numpy()
    sums = torch.zeros(3, dtype=torch.float64)
    for first in range(0, len(mine), rows_at_once):
        rows = mine[first : first + rows_at_once]
        vectors = user_vectors(model, take(validation.histories, rows))
        candidates, valid = padded(take(validation.candidates, rows))
        scores = np.einsum("rd,rcd->rc", vectors, table[candidates])
        is_target = (candidates == validation.targets[rows, None]) & valid
        found = ranks(scores, is_target.argmax(axis=1), valid)
        sums += torch.tensor(
            [hit_rate(found, RANKED_TO).sum(), ndcg(found, RANKED_TO).sum(), len(rows)], dtype=torch.float64
        )
    hit, gain, count = sum_over_ranks(sums.to(model.start.device)).tolist()
    return hit / count, gain / count


def _copy(model: SASRec) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def _seed_of(*parts: int) -> int:
    """Return a seed for torch that is as good as independent for different parts."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> np.uint64(1))
