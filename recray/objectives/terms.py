"""What the losses of the family have in common: leads that a mask keeps clean, means over what is usable, the anchor.

Axes:
    B  users
    N  negatives drawn for each
    S  either of the two: a negative a user, or N
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def checked_beta(beta: float | Float[Tensor, "B N"]) -> float | Float[Tensor, "B N"]:
    """Return `beta`.

    Raises:
        ValueError: If it is a number and not positive. One a negative is not looked at: that would wait for the device.
    """
    if not isinstance(beta, Tensor) and beta <= 0:
        raise ValueError(f"beta must be positive, got {beta}; beta=0 ignores the policy")
    return beta


def wide(score: Float[Tensor, "*S"]) -> Float[Tensor, "*S"]:
    """Return the scores in float32 or wider.

    bf16 would round the difference of two scores near -40 to a quarter of a nat.
    """
    return score.to(torch.promote_types(score.dtype, torch.float32))


def lead(
    positive_score: Float[Tensor, "*#S"], negative_score: Float[Tensor, "*S"], usable: Bool[Tensor, "*S"]
) -> Float[Tensor, "*S"]:
    """Return how far the positive lies above each negative, float32 or wider; 0, and no gradient, where not usable."""
    difference = wide(positive_score) - wide(negative_score)
    return torch.where(usable, difference, 0.0)


def usable_mean(value: Float[Tensor, "B N"], usable: Bool[Tensor, "B N"]) -> Float[Tensor, " B"]:
    """Return each user's mean over the usable; 0, and no gradient, where there is none."""
    total = torch.where(usable, value, 0.0).sum(dim=1)
    return total / usable.sum(dim=1).clamp_min(1)


def nll_anchor(policy_positive: Float[Tensor, " B"], usable: Bool[Tensor, " B"]) -> Float[Tensor, " B"]:
    """Return the positive's negative log-probability, which keeps it from falling while it leads; nats.

    0 for a user without a usable negative: such a user takes no part at all.
    """
    return torch.where(usable, -wide(policy_positive), 0.0)
