"""DMPO: the positive against the mean of several negatives.

Axes:
    B  users
    N  negatives drawn for each

Reference: Bai et al., "Finetuning Large Language Model for Personalized Ranking", https://arxiv.org/abs/2405.16127.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import logsigmoid

from recray.objectives.terms import checked_beta, lead, usable_mean


def dmpo_loss(
    positive_score: Float[Tensor, " B"],
    negative_score: Float[Tensor, "B N"],
    usable: Bool[Tensor, "B N"],
    *,
    beta: float | Float[Tensor, "B N"],
) -> Float[Tensor, " B"]:
    r"""Return one loss per user, unreduced.

        loss_i = -log sigmoid(mean_n beta * (q_pi - q_in))

    The mean is inside: a negative far below the positive makes up for one above it. With N = 1 this is DPO.

    Args:
        positive_score: [B] log-ratio against the reference of the positive, in nats.
        negative_score: [B, N] the same of each negative.
        usable: [B, N] which negatives count; the mean is over these.
        beta: Inverse temperature of the implicit reward; must be positive. One a negative: DynamicPO's.

    Returns:
        [B] loss in nats, float32 or wider. ln 2 where policy and reference agree; 0 and no gradient where no negative
        is usable.

    Raises:
        ValueError: If beta is not positive.

    >>> dmpo_loss(torch.zeros(1), torch.tensor([[-1.0, 1.0]]), torch.ones(1, 2, dtype=torch.bool), beta=1.0)
    tensor([0.6931])
    """
    each = checked_beta(beta) * lead(positive_score[:, None], negative_score, usable)
    return torch.where(usable.any(dim=1), -logsigmoid(usable_mean(each, usable)), 0.0)
