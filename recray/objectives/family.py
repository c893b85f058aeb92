"""What an objective may look at, and how one of the registry is run on it.

Axes:
    B  users whose loss is computed
    G  users of the global batch
    N  negatives of each of those: drawn for it, then items it borrows to score them itself, padded
    K  candidates: the positive, then the N negatives
"""

import importlib
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, NamedTuple

from jaxtyping import Bool, Float, Int
from torch import Tensor

from recray.objectives.dynamicpo import boundary_negatives, dual_margin_beta
from recray.objectives.registry import OBJECTIVES, named
from recray.objectives.terms import nll_anchor


class Pool(NamedTuple):
    """Negatives with margins: for objectives that share. Where users score all they use themselves, G is 1."""

    score: Float[Tensor, "G N"] | Float[Tensor, "B 1 N"]  # under the owner's prompt; detached, if as released
    usable: Bool[Tensor, "B G N"]
    margin: Float[Tensor, "B G N"]  # the borrower's, in beta * nats


class ScoreBatch(NamedTuple):
    """Scores of the whole global batch, positive first, and what these B users may use of them."""

    score: Float[Tensor, "G K"]  # nats; log-ratios where the objective has a reference
    policy: Float[Tensor, "G K"]  # nats; the same scores without a reference
    place: Int[Tensor, " B"]  # of the B users among the G
    usable: Bool[Tensor, "B N"]  # of their own negatives
    confidence: Float[Tensor, "B N"]  # of the auxiliary recommender that they are true negatives, -1/2 to 1/2
    draw: Float[Tensor, " B"]  # uniform in [0, 1), another one every step
    pool: Pool | None = None

    @property
    def positive(self) -> Float[Tensor, " B"]:
        """Scores of the users' positives."""
        return self.score[self.place, 0]

    @property
    def negative(self) -> Float[Tensor, "B N"]:
        """Scores of the users' own negatives."""
        return self.score[self.place, 1:]

    @property
    def policy_positive(self) -> Float[Tensor, " B"]:
        """Policy scores of the users' positives."""
        return self.policy[self.place, 0]

    @property
    def policy_negative(self) -> Float[Tensor, "B N"]:
        """Policy scores of the users' own negatives."""
        return self.policy[self.place, 1:]

    @property
    def first(self) -> Float[Tensor, " B"]:
        """Score of each user's first usable negative."""
        return self.negative.gather(1, self._first)[:, 0]

    @property
    def first_usable(self) -> Bool[Tensor, " B"]:
        """Whether there is one."""
        return self.usable.any(dim=1)

    @property
    def first_confidence(self) -> Float[Tensor, " B"]:
        """The confidence that it is a true negative."""
        return self.confidence.gather(1, self._first)[:, 0]

    @property
    def gap(self) -> Float[Tensor, "B N"]:
        """By how much the positive is preferred to each own negative, 0 to 1: as sure as the negative is a true one."""
        return self.confidence + 0.5

    @property
    def pool_score(self) -> Float[Tensor, "G N"] | Float[Tensor, "B 1 N"]:
        """Scores of what may be borrowed."""
        return self._shared.score

    @property
    def pool_usable(self) -> Bool[Tensor, "B G N"]:
        """Which of it each user may use."""
        return self._shared.usable

    @property
    def pool_margin(self) -> Float[Tensor, "B G N"]:
        """The lead that each user's positive must have over it."""
        return self._shared.margin

    @property
    def takes_part(self) -> Bool[Tensor, " B"]:
        """Whether there is a negative at all that the user may be compared with."""
        return self.first_usable if self.pool is None else self.pool.usable.flatten(1).any(dim=1)

    @property
    def _first(self) -> Int[Tensor, "B 1"]:
        return self.usable.int().argmax(dim=1, keepdim=True)  # of equal ones, the first

    @property
    def _shared(self) -> Pool:
        if self.pool is None:
            raise ValueError("this batch has no pool: its objective was said to share nothing")
        return self.pool


Loss = Callable[..., Float[Tensor, " B"]]


@cache
def find_loss(objective: str) -> Loss:
    """Return the function of an objective."""
    module, _, name = OBJECTIVES[objective].function.partition(":")
    loss: Loss = getattr(importlib.import_module(f"recray.objectives.{module}"), name)
    return loss


def losses(batch: ScoreBatch, objective: str, settings: Mapping[str, Any]) -> Float[Tensor, " B"]:
    """Return one loss per user, unreduced: the objective's, with DynamicPO's parts and the anchor where asked for.

    Args:
        batch: What there is to look at.
        objective: One of `OBJECTIVES`.
        settings: Every setting of it, by name.
    """
    line = OBJECTIVES[objective]
    passed = {name: settings[name] for name in map(named, line.settings)}
    if settings.get("boundary") or settings.get("dual_margin"):
        batch, passed["beta"] = _dynamic(batch, settings)
    loss = find_loss(objective)(*(getattr(batch, name) for name in line.reads), **passed)
    if settings["nll_weight"] and "nll_weight" not in passed:
        loss = loss + settings["nll_weight"] * nll_anchor(batch.policy_positive, batch.takes_part)
    return loss


def _dynamic(batch: ScoreBatch, settings: Mapping[str, Any]) -> tuple[ScoreBatch, float | Float[Tensor, "B N"]]:
    """Return the batch of which only the boundary is usable and a beta a negative, or one of the two."""
    beta = settings["beta"]
    boundary = boundary_negatives(batch.policy_positive, batch.policy_negative, batch.usable)
    if settings["dual_margin"]:
        policy = batch.policy_positive, batch.policy_negative
        beta = dual_margin_beta(*policy, boundary, batch.usable, beta=beta)
    return (batch._replace(usable=boundary) if settings["boundary"] else batch), beta
