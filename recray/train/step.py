"""One optimiser step, in score space.

What travels between ranks is scores, one number a candidate, and the gradient with respect to them; nothing is
backpropagated through a collective.

Axes:
    G  rows of the global batch      N  negatives     K  candidates: the positive, then the negatives
    B  rows of it on this rank       S  scored tokens
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from recray.config import Objective
from recray.distributed.collectives import sum_over_ranks
from recray.lm.scorer import Packed, sum_by_slot, to_device
from recray.objectives.margins import batch_margin, per_negative_margin
from recray.objectives.registry import OBJECTIVES, ScoreBatch
from recray.train.engine import Engine
from recray.train.reference import ReferencePass
from recray.train.units import Unit

CENTRE_DECAY = 0.9  # of the moving average that centres the batch margin, as released


class MarginCentre:
    """The moving average of the mean auxiliary score: state of the batch margin, kept in checkpoints."""

    def __init__(self, value: float | None = None) -> None:
        self.value = value

    def update(self, mean_score: float) -> float:
        """Return the centre before this batch (its own mean, for the first), then take the batch in."""
        before = mean_score if self.value is None else self.value
        self.value = CENTRE_DECAY * before + (1 - CENTRE_DECAY) * mean_score
        return before


class StepResult(NamedTuple):
    """What a step did."""

    metrics: dict[str, float]  # the same on every rank
    tokens: int  # that this rank passed through the model, padding not counted


def stream_step(engine: Engine, unit: Unit, *, learning_rate: float) -> StepResult:
    """Supervised fine-tuning: the mean negative log-probability of all scored tokens of the global batch."""
    scored = int(unit.arrays["scored_tokens"][0])
    total = torch.zeros(1, device=engine.device)
    tokens = 0
    for number, micro in enumerate(unit.micro_batches):
        packed = to_device(micro.layout, engine.device)
        log_probability = engine.module(packed)
        # Rows that only keep other ranks company have a pass, but no part in the loss.
        loss = -log_probability.sum() / scored * (1.0 if micro.places.size else 0.0)
        engine.backward(loss, last=number == len(unit.micro_batches) - 1)
        total += loss.detach()
        tokens += _tokens(packed)
    norm = engine.step(learning_rate)
    return StepResult({"loss": float(sum_over_ranks(total)), "grad_norm": norm}, tokens)


class AlignStep:
    """Preference optimisation over a global batch, exact however it is cut.

    Args:
        objective: What is minimised.
        centre: State of the batch margin.
        reference: Scores the reference in every step. None: the unit brings its scores, from the table.
    """

    def __init__(self, objective: Objective, centre: MarginCentre, reference: ReferencePass | None = None) -> None:
        self._settings, self._centre, self._reference = objective, centre, reference
        self._objective = OBJECTIVES[objective.name]

    def __call__(self, engine: Engine, unit: Unit, *, learning_rate: float) -> StepResult:
        """Score, exchange scores, differentiate the global loss, and send the gradient back through the model."""
        reference = torch.from_numpy(unit.arrays["reference"]).to(engine.device)
        packs = [to_device(micro.layout, engine.device) for micro in unit.micro_batches]
        places = [torch.from_numpy(micro.places).to(engine.device) for micro in unit.micro_batches]
        if self._reference is not None:
            reference = _of_all_rows(self._reference(engine, packs), places, reference)
        one_pass = len(packs) == 1  # then its graph is kept; else each micro-batch is scored again for its backward

        kept: list[Tensor] = []
        for packed in packs:
            with torch.set_grad_enabled(one_pass):
                kept.append(self._scores(engine, packed))
        every = _of_all_rows(kept, places, reference)

        grad, metrics = self._score_gradient(every, reference, unit)
        for number, (packed, place) in enumerate(zip(packs, places, strict=True)):
            scores = kept[0] if one_pass else self._scores(engine, packed)
            surrogate = (scores * grad[place].view(-1)).sum() if place.numel() else (scores * 0.0).sum()
            engine.backward(surrogate, last=number == len(packs) - 1)
        metrics["grad_norm"] = engine.step(learning_rate)
        passes = (1 if one_pass else 2) + (self._reference is not None)
        return StepResult(metrics, passes * sum(_tokens(packed) for packed in packs))

    @staticmethod
    def _scores(engine: Engine, packed: Packed) -> Float[Tensor, " scores"]:
        return sum_by_slot(engine.module(packed), packed)

    def _score_gradient(
        self, every: Float[Tensor, "G K"], reference: Float[Tensor, "G K"], unit: Unit
    ) -> tuple[Float[Tensor, "G K"], dict[str, float]]:
        """Return the gradient of the global mean loss with respect to every score, and what to log."""
        settings = self._settings
        leaf = (every - reference if settings.reference else every).requires_grad_()
        batch = self._batch(leaf, unit)
        losses = self._objective(batch, beta=settings.beta)
        share = losses.sum() / every.shape[0]
        (grad,) = torch.autograd.grad(share, leaf)
        with torch.no_grad():
            metrics = self._metrics(batch, losses, every, reference)
        return sum_over_ranks(grad), metrics

    def _batch(self, score: Float[Tensor, "G K"], unit: Unit) -> ScoreBatch:
        settings, device = self._settings, score.device
        arrays: dict[str, Tensor] = {
            name: torch.from_numpy(unit.arrays[name]).to(device)
            for name in ("place", "usable", "confidence", "liking_sum")
        }
        usable = arrays["usable"]
        if settings.name != "napo" or settings.margin == "none":
            margin = torch.zeros_like(arrays["confidence"])
        elif settings.margin == "per_negative":
            margin = per_negative_margin(arrays["confidence"], base=settings.margin_base, slope=settings.margin_slope)
        else:
            margin = torch.full_like(arrays["confidence"], self._batch_margin(arrays["liking_sum"], usable))
        if settings.subtract_log_pool:
            margin = margin - usable.sum(dim=(1, 2)).clamp_min(1).log()[:, None, None]
        pool = score[:, 1:].detach() if settings.detach_shared else score[:, 1:]
        return ScoreBatch(score, pool, arrays["place"], usable, margin)

    def _batch_margin(self, liking_sum: Tensor, usable: Tensor) -> float:
        total, count = sum_over_ranks(torch.stack([liking_sum[0], usable.sum().to(liking_sum.dtype)])).tolist()
        mean = total / max(1.0, count)
        settings = self._settings
        return batch_margin(mean, self._centre.update(mean), base=settings.margin_base, slope=settings.margin_slope)

    def _metrics(self, batch: ScoreBatch, losses: Tensor, every: Tensor, reference: Tensor) -> dict[str, float]:
        """Return means over the users of the global batch."""
        beta, place = self._settings.beta, batch.place
        ratio = (every - reference)[place]
        positive, negative = beta * ratio[:, 0], beta * ratio[:, 1:]
        logits = beta * (batch.pool[None] - batch.positive[:, None, None]) + batch.margin
        weight = logits.masked_fill(~batch.usable, -math.inf).flatten(1).softmax(dim=1).nan_to_num()
        policy, frozen = every[place].log_softmax(dim=1), reference[place].log_softmax(dim=1)
        each = {
            "loss": losses,
            "positive_reward": positive,
            "negative_reward": negative.mean(dim=1),
            "margin": positive - negative.mean(dim=1),
            "accuracy": (positive[:, None] > negative).float().mean(dim=1),
            "kl": (policy.exp() * (policy - frozen)).sum(dim=1),  # over the user's own candidates
            "effective_negatives": torch.special.entr(weight).sum(dim=1).exp(),
            "usable_negatives": batch.usable.sum(dim=(1, 2)).float(),
            "asked_margin": batch.margin.flatten(1).mean(dim=1),
        }
        sums = torch.stack([value.double().sum() for value in each.values()])
        means = sum_over_ranks(sums) / every.shape[0]
        return dict(zip(each, means.tolist(), strict=True))


def _of_all_rows(
    scores: list[Float[Tensor, " _"]], places: list[Int[Tensor, " _"]], like: Float[Tensor, "G K"]
) -> Float[Tensor, "G K"]:
    """Return the scores of the global batch, of which each rank has its own micro-batches'; detached."""
    own = torch.zeros(like.shape, dtype=scores[0].dtype, device=like.device)
    for each, place in zip(scores, places, strict=True):
        if place.numel():
            own[place] = each.detach().view(place.numel(), -1)
    return sum_over_ranks(own)  # each row is some rank's own, the others add zero


def learning_rate_at(step: int, steps: int, *, peak: float, warmup_fraction: float, final_fraction: float) -> float:
    """Return the rate of a 0-based step: linear warm-up, then cosine from `peak` to `final_fraction * peak`."""
    warmup = math.ceil(warmup_fraction * steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - 1 - warmup)
    return peak * (final_fraction + (1 - final_fraction) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


def _tokens(packed: Packed) -> int:
    return int((packed.segment >= 0).sum())
