"""One optimiser step, in score space.

What travels between ranks is scores, one number a candidate, and the gradient with respect to them; nothing is
backpropagated through a collective.

Axes:
    G  rows of the global batch      N  negatives     K  candidates: the positive, then the negatives
    B  rows of it on this rank       S  scored tokens
"""

import math
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from recray.config import Objective
from recray.distributed.collectives import sum_over_ranks
from recray.lm.scorer import Packed, sum_by_slot, to_device
from recray.objectives.margins import batch_margin, per_negative_margin
from recray.objectives.registry import OBJECTIVES, ScoreBatch
from recray.objectives.sharing import borrower_chunks
from recray.train.engine import Engine
from recray.train.reference import ReferencePass
from recray.train.units import Unit

METRICS = (
    *("loss", "positive_reward", "negative_reward", "margin", "accuracy", "kl"),
    *("effective_negatives", "usable_negatives", "asked_margin"),
)
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
    skipped: bool = False  # nothing was updated: the loss, a score or the gradient was not finite
    bad_rows: tuple[int, ...] = ()  # ids of the rows to blame for that, the same on every rank


def stream_step(engine: Engine, unit: Unit, *, learning_rate: float) -> StepResult:
    """Supervised fine-tuning: the mean negative log-probability of all scored tokens of the global batch."""
    scored = int(unit.arrays["scored_tokens"][0])
    own = torch.zeros(len(unit.rows), dtype=torch.float64, device=engine.device)  # log-probability of each row
    loss, tokens = math.nan, 0
    for number, micro in enumerate(unit.micro_batches):
        packed = to_device(micro.layout, engine.device)
        rows = sum_by_slot(engine.module(packed), packed)
        # Rows that only keep other ranks company have a pass, but no part in the loss.
        share = -rows.sum() / scored * (1.0 if micro.places.size else 0.0)
        if micro.places.size:
            own[torch.from_numpy(micro.places).to(engine.device)] = rows.detach()
        last = number == len(unit.micro_batches) - 1
        if last:
            loss = -float(sum_over_ranks(own.sum())) / scored
            share = share if math.isfinite(loss) else share * math.nan  # an engine never updates on a NaN
        engine.backward(share, last=last)
        tokens += _tokens(packed)
    norm = engine.step(learning_rate)
    metrics = {"loss": loss, "grad_norm": norm}
    if math.isfinite(loss) and math.isfinite(norm):
        return StepResult(metrics, tokens)
    return StepResult(metrics, tokens, True, _named(~sum_over_ranks(own).isfinite(), unit))


class AlignStep:
    """Preference optimisation over a global batch, exact however it is cut.

    Args:
        objective: What is minimised.
        centre: State of the batch margin; a skipped step leaves it as it was.
        reference: Scores the reference in every step. None: the unit brings its scores, from the table.
    """

    def __init__(self, objective: Objective, centre: MarginCentre, reference: ReferencePass | None = None) -> None:
        self._settings, self._centre, self._reference = objective, centre, reference
        self._objective = OBJECTIVES[objective.name]

    def __call__(self, engine: Engine, unit: Unit, *, learning_rate: float) -> StepResult:
        """Score, exchange scores, differentiate the global loss, and send the gradient back through the model."""
        centre = self._centre.value
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

        found = self._differentiate(every, reference, unit)
        # All ranks agree on this: what it looks at has been summed over them.
        sound = math.isfinite(found.metrics["loss"]) and bool((found.score.isfinite() & found.grad.isfinite()).all())
        grad = found.grad if sound else torch.full_like(found.grad, math.nan)  # an engine never updates on a NaN
        for number, (packed, place) in enumerate(zip(packs, places, strict=True)):
            scores = kept[0] if one_pass else self._scores(engine, packed)
            surrogate = (scores * grad[place].view(-1)).sum() if place.numel() else (scores * 0.0).sum()
            engine.backward(surrogate, last=number == len(packs) - 1)
        norm = engine.step(learning_rate)

        metrics = found.metrics | {"grad_norm": norm}
        passes = (1 if one_pass else 2) + (self._reference is not None)
        tokens = passes * sum(_tokens(packed) for packed in packs)
        if sound and math.isfinite(norm):
            return StepResult(metrics, tokens)
        self._centre.value = centre
        return StepResult(metrics, tokens, True, _named(self._bad(found, unit), unit))

    @staticmethod
    def _scores(engine: Engine, packed: Packed) -> Float[Tensor, " scores"]:
        return sum_by_slot(engine.module(packed), packed)

    def _differentiate(self, every: Float[Tensor, "G K"], reference: Float[Tensor, "G K"], unit: Unit) -> "_Found":
        """Return the global mean loss's gradient with respect to every score, and what to log.

        The objective is one loss a borrower, so borrowers are taken in chunks whose work on [B, G, N] stays small.
        """
        settings = self._settings
        score = (every - reference if settings.reference else every).requires_grad_()
        flat = self._margin_of_batch(unit, score.device)
        grad, losses = torch.zeros_like(score), [score.new_zeros(0)]
        sums = torch.zeros(len(METRICS), dtype=torch.float64, device=score.device)
        for rows in borrower_chunks(*unit.arrays["usable"].shape):
            batch = self._batch(score, unit, rows, flat)
            loss = self._objective(batch, beta=settings.beta)
            grad += torch.autograd.grad(loss.sum() / len(every), score)[0]
            losses.append(loss.detach())
            with torch.no_grad():
                sums += self._metric_sums(batch, losses[-1], every, reference)
        total = sum_over_ranks(torch.cat([grad.flatten(), sums.to(grad.dtype)]))
        means = total[grad.numel() :] / len(every)
        metrics = dict(zip(METRICS, means.tolist(), strict=True))
        return _Found(score.detach(), total[: grad.numel()].view_as(grad), torch.cat(losses), metrics)

    def _batch(self, score: Float[Tensor, "G K"], unit: Unit, rows: slice, flat: float) -> ScoreBatch:
        """Return what the objective may look at for some of this rank's rows; `flat` is the margin where all have one.

        Margins are made in the scores' own precision, not in that of the confidences.
        """
        settings = self._settings
        place, usable, confidence = (
            torch.from_numpy(unit.arrays[name][rows]).to(score.device) for name in ("place", "usable", "confidence")
        )
        if settings.name == "napo" and settings.margin == "per_negative":
            margin = per_negative_margin(
                confidence.to(score.dtype), base=settings.margin_base, slope=settings.margin_slope
            )
        else:
            margin = torch.full(confidence.shape, flat, dtype=score.dtype, device=score.device)
        if settings.subtract_log_pool:
            margin = margin - usable.sum(dim=(1, 2)).to(score.dtype).clamp_min(1).log()[:, None, None]
        pool = score[:, 1:].detach() if settings.detach_shared else score[:, 1:]
        return ScoreBatch(score, pool, place, usable, margin)

    def _margin_of_batch(self, unit: Unit, device: torch.device) -> float:
        """Return the one margin of the global batch; 0 where the objective has none or one a negative."""
        settings = self._settings
        if settings.name != "napo" or settings.margin != "batch":
            return 0.0
        own = [float(unit.arrays["liking_sum"][0]), float(np.count_nonzero(unit.arrays["usable"]))]
        total, count = sum_over_ranks(torch.tensor(own, dtype=torch.float64, device=device)).tolist()
        mean = total / max(1.0, count)
        return batch_margin(mean, self._centre.update(mean), base=settings.margin_base, slope=settings.margin_slope)

    def _metric_sums(
        self, batch: ScoreBatch, losses: Float[Tensor, " B"], every: Float[Tensor, "G K"], reference: Tensor
    ) -> Float[Tensor, " metrics"]:
        """Return sums over these users, in the order of `METRICS`."""
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
            "accuracy": (positive[:, None] > negative).double().mean(dim=1),
            "kl": (policy.exp() * (policy - frozen)).sum(dim=1),  # over the user's own candidates
            "effective_negatives": torch.special.entr(weight).sum(dim=1).exp(),
            "usable_negatives": batch.usable.sum(dim=(1, 2)),
            "asked_margin": batch.margin.flatten(1).mean(dim=1),
        }
        return torch.stack([each[name].double().sum() for name in METRICS])

    @staticmethod
    def _bad(found: "_Found", unit: Unit) -> Bool[Tensor, " G"]:
        """Return which rows' scores are not finite, or if all are, which rows' losses; a collective.

        Scores first: through sharing, one such score spoils the losses of all who borrow it.
        """
        bad = ~found.score.isfinite().all(dim=1)
        if bad.any():
            return bad
        own = torch.zeros(len(unit.rows), device=bad.device)
        own[torch.from_numpy(unit.arrays["place"]).to(bad.device)] = (~found.losses.isfinite()).float()
        return sum_over_ranks(own) > 0


class _Found(NamedTuple):
    """What the global batch's scores led to."""

    score: Float[Tensor, "G K"]  # as the objective saw it
    grad: Float[Tensor, "G K"]  # of the global mean loss
    losses: Float[Tensor, " B"]
    metrics: dict[str, float]  # means over the users of the global batch


def _named(bad: Bool[Tensor, " G"], unit: Unit) -> tuple[int, ...]:
    """Return the ids of these rows; of all where it is none, as when only the gradient overflowed."""
    places = bad.nonzero()[:, 0].tolist() if bad.any() else range(len(unit.rows))
    return tuple(sorted({unit.rows[place] for place in places}))


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
