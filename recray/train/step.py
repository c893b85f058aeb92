"""One optimiser step, in score space.

What travels between ranks is scores, one number a candidate, and the gradient with respect to them; nothing is
backpropagated through a collective.

Axes:
    G  rows of the global batch      N  negatives     K  candidates: the positive, then the negatives
    B  rows of it on this rank       S  scored tokens
    C  a row's candidates, then items that it borrows, padded: K where it borrows none
    O  users whose negatives a borrower looks at: G where scores are shared, else 1, itself
"""

import math
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy import ndarray
from torch import Tensor

from recray.config import Objective
from recray.data.hashing import mix
from recray.data.hashing import unit as uniform
from recray.distributed.collectives import sum_over_ranks
from recray.lm.scorer import Packed, sum_by_slot, to_device
from recray.objectives.family import Pool, ScoreBatch, find_loss, losses
from recray.objectives.margins import batch_margin, per_negative_margin, shrunk_margin
from recray.objectives.sharing import borrower_chunks, own_only
from recray.objectives.watching import WATCHED, watched
from recray.train.engine import Engine
from recray.train.reference import ReferencePass
from recray.train.units import MicroBatch, Unit

METRICS = (
    *("loss", "positive_reward", "negative_reward", "margin", "accuracy", "kl"),
    *("effective_negatives", "usable_negatives", "log_pool", "asked_margin"),
)  # means over users, which ranks sum; beside them, of the whole table of scores, `WATCHED`
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
        find_loss(objective.name)  # a name without a function is found here, not in the first step
        self._objective = partial(losses, objective=objective.name, settings=objective.settings)

    def __call__(self, engine: Engine, unit: Unit, *, learning_rate: float) -> StepResult:
        """Score, exchange scores, differentiate the global loss, and send the gradient back through the model."""
        centre = self._centre.value
        reference = torch.from_numpy(unit.arrays["reference"]).to(engine.device)
        packs = [to_device(micro.layout, engine.device) for micro in unit.micro_batches]
        cells = [_cells(micro, unit, reference.shape[1]).to(engine.device) for micro in unit.micro_batches]
        if self._reference is not None:
            reference = _of_all_rows(self._reference(engine, packs), cells, reference)
        one_pass = len(packs) == 1  # then its graph is kept; else each micro-batch is scored again for its backward

        kept: list[Tensor] = []
        for packed in packs:
            with torch.set_grad_enabled(one_pass):
                kept.append(self._scores(engine, packed))
        every = _of_all_rows(kept, cells, reference)

        lengths = None
        if self._settings.length_normalised:
            tokens_each = [torch.bincount(packed.slot, minlength=packed.num_scores).to(every) for packed in packs]
            lengths = _of_all_rows(tokens_each, cells, reference).clamp_min(1)  # 0 where there is no item
        found = self._differentiate(every, reference, unit, lengths)
        # All ranks agree on this: what it looks at has been summed over them.
        sound = math.isfinite(found.metrics["loss"]) and bool((found.score.isfinite() & found.grad.isfinite()).all())
        grad = found.grad if sound else torch.full_like(found.grad, math.nan)  # an engine never updates on a NaN
        for number, (packed, cell) in enumerate(zip(packs, cells, strict=True)):
            scores = kept[0] if one_pass else self._scores(engine, packed)
            surrogate = (scores * grad.flatten()[cell]).sum() if cell.numel() else (scores * 0.0).sum()
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

    def _differentiate(
        self,
        every: Float[Tensor, "G C"],
        reference: Float[Tensor, "G C"],
        unit: Unit,
        lengths: Float[Tensor, "G C"] | None = None,
    ) -> "_Found":
        """Return the global mean loss's gradient with respect to every score, and what to log.

        The objective is one loss a borrower, so borrowers are taken in chunks whose work on [B, G, N] stays small; it
        is [B, 1, N] where no scores are shared. With `lengths`, tokens of each item, scores are means over them.
        """
        flat = self._margin_of_batch(unit, every.device)
        drawn = self._drawn(every, reference, lengths)
        leaf = every.detach().requires_grad_()
        grad, each = torch.zeros_like(every), [every.new_zeros(0)]
        sums = torch.zeros(len(METRICS), dtype=torch.float64, device=every.device)
        for rows in borrower_chunks(*unit.arrays["usable"].shape):
            batch = self._batch(*self._seen(leaf, reference, lengths), unit, rows, flat)
            loss = self._objective(batch)
            grad += torch.autograd.grad(loss.sum() / len(every), leaf)[0]
            each.append(loss.detach())
            with torch.no_grad():
                sums += self._metric_sums(batch, each[-1], *drawn)
        total = sum_over_ranks(torch.cat([grad.flatten(), sums.to(grad.dtype)]))
        grad = total[: grad.numel()].view_as(grad)
        score, policy = self._seen(every, reference, lengths)
        found = watched(policy, self._rewards(*drawn), grad, _present(unit, every))
        means = torch.cat([total[grad.numel() :] / len(every), found.to(total)]).tolist()
        return _Found(score, grad, torch.cat(each), dict(zip((*METRICS, *WATCHED), means, strict=True)))

    def _drawn(
        self, every: Float[Tensor, "G C"], reference: Float[Tensor, "G C"], lengths: Float[Tensor, "G C"] | None
    ) -> tuple[Float[Tensor, "G K"], Float[Tensor, "G K"], Float[Tensor, "G K"] | None]:
        """Return the part of what was drawn for each row: a table has no reference scores of what it borrows."""
        own = slice(every.shape[1] - self._settings.most_borrowed)
        return every[:, own], reference[:, own], None if lengths is None else lengths[:, own]

    def _seen(
        self, every: Float[Tensor, "G C"], reference: Float[Tensor, "G C"], lengths: Float[Tensor, "G C"] | None
    ) -> tuple[Float[Tensor, "G C"], Float[Tensor, "G C"]]:
        """Return scores as the objective sees them, and the policy's own beside them."""
        policy = every if lengths is None else every / lengths
        if not self._settings.uses_reference:
            return policy, policy
        return policy - (reference if lengths is None else reference / lengths), policy

    def _rewards(
        self, every: Float[Tensor, "G K"], reference: Float[Tensor, "G K"], lengths: Float[Tensor, "G K"] | None
    ) -> Float[Tensor, "G K"]:
        """Return the implicit rewards: beta times log-ratios, whether or not the objective has a reference."""
        ratio = every - reference
        return self._settings.beta * (ratio if lengths is None else ratio / lengths)

    def _batch(
        self, score: Float[Tensor, "G C"], policy: Float[Tensor, "G C"], unit: Unit, rows: slice, flat: float
    ) -> ScoreBatch:
        """Return what the objective may look at for some of this rank's rows; `flat`: the margin where all have one."""
        place = unit.arrays["place"][rows]
        usable, sure = unit.arrays["usable"][rows], unit.arrays["confidence"][rows]
        own = np.arange(place.size), place if self._settings.shares_scores else 0
        draw = uniform(mix(unit.step, np.array(unit.rows)[place]))
        mine = [
            torch.from_numpy(array).to(score.device)
            for array in (place, usable[own], sure[own].astype(np.float64), draw)
        ]
        pool = self._pool(score, mine[0], usable, sure, flat) if self._settings.has_margins else None
        return ScoreBatch(score, policy, mine[0], mine[1], mine[2], mine[3], pool)

    def _pool(
        self,
        score: Float[Tensor, "G C"],
        place: Int[Tensor, " B"],
        usable: Bool[ndarray, "B O N"],
        sure: Float[ndarray, "B O N"],
        flat: float,
    ) -> Pool:
        """Return negatives with margins. Those are made in the scores' precision, not in that of the confidences."""
        settings = self._settings
        may, confidence = (torch.from_numpy(array).to(score.device) for array in (usable, sure))
        margin = margins_of(settings, confidence.to(score.dtype), self._borrowed(place, may), flat=flat)
        if settings.subtract_log_pool:
            margin = margin - may.sum(dim=(1, 2)).to(score.dtype).clamp_min(1).log()[:, None, None]
        negative = score[:, 1:] if settings.shares_scores else score[place, 1:][:, None]
        return Pool(negative.detach() if settings.detach_shared else negative, may, margin)

    def _borrowed(self, place: Int[Tensor, " B"], usable: Bool[Tensor, "B O N"]) -> Bool[Tensor, "_ _ _"]:
        """Return which negatives are borrowed: all but the row's own, or what stands behind those in one list."""
        if self._settings.shares_scores:
            return ~own_only(place, usable.shape[1])[:, :, None]
        number = torch.arange(usable.shape[2], device=usable.device)
        return (number >= usable.shape[2] - self._settings.most_borrowed)[None, None]

    def _margin_of_batch(self, unit: Unit, device: torch.device) -> float:
        """Return the one margin of the global batch; 0 where the objective has none or one a negative."""
        settings = self._settings
        if not settings.has_margins or settings.margin != "batch":
            return 0.0
        own = [float(unit.arrays["liking_sum"][0]), float(np.count_nonzero(unit.arrays["usable"]))]
        total, count = sum_over_ranks(torch.tensor(own, dtype=torch.float64, device=device)).tolist()
        mean = total / max(1.0, count)
        return batch_margin(mean, self._centre.update(mean), base=settings.margin_base, slope=settings.margin_slope)

    def _metric_sums(
        self,
        batch: ScoreBatch,
        loss: Float[Tensor, " B"],
        every: Float[Tensor, "G K"],
        reference: Float[Tensor, "G K"],
        lengths: Float[Tensor, "G K"] | None,
    ) -> Float[Tensor, " metrics"]:
        """Return sums over these users, in the order of `METRICS`."""
        place, pool = batch.place, batch.pool
        reward = self._rewards(every, reference, lengths)[place]
        positive, negative = reward[:, 0], reward[:, 1:]
        usable = batch.usable[:, None] if pool is None else pool.usable
        others = batch.negative[:, None] if pool is None else pool.score
        margin = torch.zeros_like(others) if pool is None else pool.margin
        logits = self._settings.beta * (others - batch.positive[:, None, None]) + margin
        weight = logits.masked_fill(~usable, -math.inf).flatten(1).softmax(dim=1).nan_to_num()
        policy, frozen = every[place].log_softmax(dim=1), reference[place].log_softmax(dim=1)
        count = usable.sum(dim=(1, 2))
        each = {
            "loss": loss,
            "positive_reward": positive,
            "negative_reward": negative.mean(dim=1),
            "margin": positive - negative.mean(dim=1),
            "accuracy": (positive[:, None] > negative).double().mean(dim=1),
            "kl": (policy.exp() * (policy - frozen)).sum(dim=1),  # over the user's own candidates
            "effective_negatives": torch.special.entr(weight).sum(dim=1).exp(),
            "usable_negatives": count,
            "log_pool": count.clamp_min(1).log(),
            "asked_margin": margin.where(usable, 0.0).sum(dim=(1, 2)) / count.clamp_min(1),
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


def margins_of(
    objective: Objective,
    confidence: Float[Tensor, "B O N"],
    borrowed: Bool[Tensor, "_ _ _"],
    *,
    flat: float = 0.0,
) -> Float[Tensor, "B O N"]:
    """Return the margin asked over each negative, smaller where the guard by nearness says so.

    Args:
        objective: With margins.
        confidence: The user's, in each.
        borrowed: Which were not drawn for the user itself; the guard leaves those that were, unless it is told not to.
        flat: The margin of the batch, where it has one.
    """
    if objective.margin == "per_negative":
        margin = per_negative_margin(confidence, base=objective.margin_base, slope=objective.margin_slope)
    else:
        margin = torch.full_like(confidence, flat)
    if objective.guard_near != "shrink":
        return margin
    less = shrunk_margin(margin, confidence, threshold=objective.guard_threshold)
    return less if objective.guard_own else torch.where(borrowed, less, margin)


def _cells(micro: MicroBatch, unit: Unit, width: int) -> Int[Tensor, " scores"]:
    """Return where each score of a micro-batch stands in the flattened table of the global batch."""
    each = _candidates_each(unit, width)[micro.places]
    number = np.arange(width)
    return torch.from_numpy((micro.places[:, None] * width + number)[number < each[:, None]])


def _candidates_each(unit: Unit, width: int) -> Int[ndarray, " G"]:
    """Return how many items of each row are scored; all, where no row borrows any."""
    return unit.arrays.get("candidates_each", np.full(len(unit.rows), width))


def _present(unit: Unit, like: Float[Tensor, "G C"]) -> Bool[Tensor, "G C"]:
    """Return what of the global batch's table is no padding."""
    each = torch.from_numpy(_candidates_each(unit, like.shape[1])).to(like.device)
    return torch.arange(like.shape[1], device=like.device) < each[:, None]


def _of_all_rows(
    scores: list[Float[Tensor, " _"]], cells: list[Int[Tensor, " _"]], like: Float[Tensor, "G C"]
) -> Float[Tensor, "G C"]:
    """Return the scores of the global batch, of which each rank has its own micro-batches'; detached, 0 for padding."""
    own = torch.zeros(like.numel(), dtype=scores[0].dtype, device=like.device)
    for each, cell in zip(scores, cells, strict=True):
        if cell.numel():
            own[cell] = each.detach()
    return sum_over_ranks(own).view(like.shape)  # each cell is some rank's own, the others add zero


def learning_rate_at(step: int, steps: int, *, peak: float, warmup_fraction: float, final_fraction: float) -> float:
    """Return the rate of a 0-based step: linear warm-up, then cosine from `peak` to `final_fraction * peak`."""
    warmup = math.ceil(warmup_fraction * steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - 1 - warmup)
    return peak * (final_fraction + (1 - final_fraction) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


def _tokens(packed: Packed) -> int:
    return int((packed.segment >= 0).sum())
