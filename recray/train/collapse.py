"""Does ranking get worse while the loss gets better: the collapse that DynamicPO describes, and plain over-fitting.

Reference: DynamicPO, https://arxiv.org/abs/2605.00327 for its name and cause: easy negatives take the gradient.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

FALL = 0.05  # of the best value: less is what validation rows do by chance
PATIENCE = 2  # validations since the best one


class Collapse(NamedTuple):
    """Validation fell while the loss fell."""

    best: float  # of the validation metric
    best_step: int
    last: float
    loss_then: float  # mean over the steps up to the best, or up to the first validation where the start was best
    loss_now: float  # mean over the steps since the last validation but one

    def __str__(self) -> str:
        """Return what happened, and what to do about it."""
        return (
            f"validation fell from {self.best:.4f} at step {self.best_step} to {self.last:.4f}, the loss from "
            f"{self.loss_then:.4f} to {self.loss_now:.4f}: what is learnt is no longer ranking. The best weights are "
            f"kept. Lower the learning rate or take fewer steps; where easy negatives take the gradient, harder or "
            f"fewer of them (negatives.sampler=popularity), reference=false, boundary=true, or an anchor (nll_weight)"
        )


def collapse(lines: Sequence[Mapping[str, Any]], watched: str) -> Collapse | None:
    """Return the collapse that a run's metrics lines show at their end, or None.

    It is one if the best validation is `PATIENCE` validations ago or more, the last is lower by more than `FALL` of it,
    and the mean loss between the last two validations is below that before the best.
    """
    validations = [(line["step"], line[watched]) for line in lines if line["kind"] == "validation"]
    if len(validations) <= PATIENCE:
        return None
    steps, values = zip(*validations, strict=True)
    best = int(np.argmax(values))
    if len(values) - 1 - best < PATIENCE or values[-1] >= (1 - FALL) * values[best]:
        return None
    until = max(best, 1)
    then, now = _mean_loss(lines, steps[until - 1], steps[until]), _mean_loss(lines, steps[-2], steps[-1])
    if not now < then:  # NaN, of no steps or of skipped ones, says nothing
        return None
    return Collapse(float(values[best]), int(steps[best]), float(values[-1]), then, now)


def _mean_loss(lines: Sequence[Mapping[str, Any]], after: int, up_to: int) -> float:
    losses = [line["loss"] for line in lines if line["kind"] == "train" and after < line["step"] <= up_to]
    return float(np.mean(losses)) if losses else float("nan")
