"""DPO: direct preference optimization, one negative a positive.

Axes:
    B  users

Reference: Rafailov et al., "Direct Preference Optimization: Your Language Model is Secretly a Reward Model",
https://arxiv.org/abs/2305.18290, equation 7.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import logsigmoid

from recray.objectives.terms import checked_beta, lead


def dpo_loss(
    positive_score: Float[Tensor, " B"],
    negative_score: Float[Tensor, " B"],
    usable: Bool[Tensor, " B"],
    *,
    beta: float,
) -> Float[Tensor, " B"]:
    r"""Return one loss per user, unreduced.

        loss_i = -log sigmoid(beta * (q_pi - q_di))

    Args:
        positive_score: [B] log-ratio `log pi(item | prompt) - log pi_ref(item | prompt)` of the positive, in nats.
        negative_score: [B] the same of the negative.
        usable: [B] whether there is one.
        beta: Inverse temperature of the implicit reward; must be positive.

    Returns:
        [B] loss in nats, float32 or wider. ln 2 where policy and reference agree; 0 and no gradient where not usable.

    Raises:
        ValueError: If beta is not positive.

    >>> dpo_loss(torch.tensor([0.0]), torch.tensor([0.0]), torch.tensor([True]), beta=0.1)
    tensor([0.6931])
    """
    loss = -logsigmoid(checked_beta(beta) * lead(positive_score, negative_score, usable))
    return torch.where(usable, loss, 0.0)
