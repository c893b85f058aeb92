"""RecPO: S-DPO with a margin a pair that follows how much more the positive is preferred.

Axes:
    B  users
    N  negatives drawn for each

Reference: RecPO, https://arxiv.org/abs/2506.02261. There the gap comes from explicit ratings (and how recent they are);
most logs here have none, so the caller passes the auxiliary recommender's: see `ScoreBatch.gap`.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import pad

from recray.objectives.terms import checked_beta, lead


def recpo_loss(
    positive_score: Float[Tensor, " B"],
    negative_score: Float[Tensor, "B N"],
    gap: Float[Tensor, "B N"],
    usable: Bool[Tensor, "B N"],
    *,
    beta: float,
    gap_weight: float,
) -> Float[Tensor, " B"]:
    r"""Return one loss per user, unreduced.

        loss_i = -log sigmoid(-log sum_n exp(beta * (q_in - q_pi) + gap_weight * gap_in))

    Args:
        positive_score: [B] log-ratio against the reference of the positive, in nats; or its score, without reference.
        negative_score: [B, N] the same of each negative.
        gap: [B, N] by how much the positive is preferred to each negative, 0 to 1; outside the margin's beta.
        usable: [B, N] which negatives count.
        beta: Inverse temperature of the implicit reward; must be positive.
        gap_weight: lambda, the margin in beta * nats of a pair whose gap is 1. 0 makes this S-DPO.

    Returns:
        [B] loss in nats, float32 or wider; 0 and no gradient where no negative is usable.

    Raises:
        ValueError: If beta is not positive.

    >>> one = torch.ones(1, 3)
    >>> recpo_loss(torch.zeros(1), 0 * one, one, one.bool(), beta=1.0, gap_weight=0.0)
    tensor([1.3863])
    """
    ahead = lead(positive_score[:, None], negative_score, usable)
    logits = gap_weight * gap.to(ahead.dtype) - checked_beta(beta) * ahead
    return pad(logits.masked_fill(~usable, -torch.inf), (1, 0), value=0.0).logsumexp(dim=1)
