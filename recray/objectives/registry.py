"""Objectives by name: a new one is a file beside this and a line in `OBJECTIVES`.

Axes:
    B  users whose loss is computed
    G  users of the global batch
    N  negatives drawn for each of those
    K  candidates: the positive, then the N negatives
"""

from collections.abc import Callable
from typing import NamedTuple

from jaxtyping import Bool, Float, Int
from torch import Tensor

from recray.objectives.cross_entropy import candidate_cross_entropy
from recray.objectives.dpo import dpo_loss
from recray.objectives.napo import napo_loss
from recray.objectives.sdpo import sdpo_loss


class ScoreBatch(NamedTuple):
    """What an objective may look at: scores of the whole global batch, and what these B users may use of them."""

    score: Float[Tensor, "G K"]  # nats; positive first; log-ratios where the objective has a reference
    pool: Float[Tensor, "G N"]  # the negatives of `score` as borrowed: detached from it, if as released
    place: Int[Tensor, " B"]  # of the B users among the G
    usable: Bool[Tensor, "B G N"]
    margin: Float[Tensor, "B G N"]

    @property
    def positive(self) -> Float[Tensor, " B"]:
        """Scores of the users' positives."""
        return self.score[self.place, 0]

    @property
    def own(self) -> Float[Tensor, "B N"]:
        """Scores of the users' own negatives."""
        return self.score[self.place, 1:]


Objective = Callable[..., Float[Tensor, " B"]]


def napo(batch: ScoreBatch, *, beta: float) -> Float[Tensor, " B"]:
    """NAPO over all usable negatives of the global batch."""
    return napo_loss(batch.positive, batch.pool, batch.margin, batch.usable, beta=beta)


def sdpo(batch: ScoreBatch, *, beta: float) -> Float[Tensor, " B"]:
    """S-DPO over the users' own negatives."""
    return sdpo_loss(batch.positive, batch.own, beta=beta)


def dpo(batch: ScoreBatch, *, beta: float) -> Float[Tensor, " B"]:
    """DPO with the first negative of each user."""
    return dpo_loss(batch.positive, batch.own[:, 0], beta=beta)


def cross_entropy(batch: ScoreBatch, *, beta: float) -> Float[Tensor, " B"]:
    """Cross-entropy over the users' own candidates at temperature 1 / beta."""
    return candidate_cross_entropy(beta * batch.positive, beta * batch.own)


OBJECTIVES: dict[str, Objective] = {
    "napo": napo,
    "sdpo": sdpo,
    "dpo": dpo,
    "cross_entropy": cross_entropy,
}
