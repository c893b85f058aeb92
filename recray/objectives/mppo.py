"""MPPO: the positive against each of several negatives by the geometric mean of token probabilities, no reference.

Axes:
    B  users
    N  negatives drawn for each

Reference: "MPPO: Multi Pair-wise Preference Optimization for LLMs with Arbitrary Negative Samples",
https://arxiv.org/abs/2412.15244.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import logsigmoid

from recray.objectives.terms import checked_beta, lead, wide


def mppo_loss(
    positive_score: Float[Tensor, " B"],
    negative_score: Float[Tensor, "B N"],
    usable: Bool[Tensor, "B N"],
    *,
    beta: float | Float[Tensor, "B N"],
) -> Float[Tensor, " B"]:
    r"""Return one loss per user, unreduced.

        loss_i = -log sigmoid(sum_n beta * (P_pi - P_in)),   P = exp(score)

    Where scores are means over tokens, P is a mean probability of a token; that is the paper's, with beta = 1. The sum
    grows with the number of usable negatives, as in the paper. A log-probability is never above 0: what lies above, by
    rounding or because it is none, counts as 0 and gets no gradient.

    Args:
        positive_score: [B] `log pi(item | prompt) / tokens of the item` of the positive, in nats a token: no reference.
        negative_score: [B, N] the same of each negative.
        usable: [B, N] which negatives count.
        beta: Factor of each pair; must be positive. One a negative: DynamicPO's.

    Returns:
        [B] loss in nats, float32 or wider; 0 and no gradient where no negative is usable.

    Raises:
        ValueError: If beta is not positive.

    >>> mppo_loss(torch.zeros(1), torch.tensor([[0.0, 0.0]]), torch.ones(1, 2, dtype=torch.bool), beta=1.0)
    tensor([0.6931])
    """
    positive = wide(positive_score).clamp_max(0.0).exp()
    # Masked before exp, whose gradient at NaN is NaN even where nothing comes back.
    negative = torch.where(usable, wide(negative_score), 0.0).clamp_max(0.0).exp()
    total = (checked_beta(beta) * lead(positive[:, None], negative, usable)).sum(dim=1)
    return torch.where(usable.any(dim=1), -logsigmoid(total), 0.0)
