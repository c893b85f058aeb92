"""DPO: direct preference optimization, one negative a positive.

Axes:
    B  users

Reference: Rafailov et al., "Direct Preference Optimization: Your Language Model is Secretly a Reward Model",
https://arxiv.org/abs/2305.18290, equation 7.
"""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid


def dpo_loss(
    positive_score: Float[Tensor, " B"], negative_score: Float[Tensor, " B"], *, beta: float
) -> Float[Tensor, " B"]:
    r"""Return one loss per user, unreduced.

        loss_i = -log sigmoid(beta * (q_pi - q_di))

    Args:
        positive_score: [B] log-ratio `log pi(item | prompt) - log pi_ref(item | prompt)` of the positive, in nats.
        negative_score: [B] the same of the negative.
        beta: Inverse temperature of the implicit reward; must be positive.

    Returns:
        [B] loss in nats, float32 or wider. ln 2 where policy and reference agree.

    Raises:
        ValueError: If beta is not positive.

    >>> dpo_loss(torch.tensor([0.0]), torch.tensor([0.0]), beta=0.1)
    tensor([0.6931])
    """
    if beta <= 0:
        raise ValueError(f"beta must be positive, got {beta}; beta=0 ignores the policy")
    # bf16 would round the difference of two scores near -40 to a quarter of a nat.
    dtype = torch.promote_types(positive_score.dtype, torch.float32)
    return -logsigmoid(beta * (positive_score.to(dtype) - negative_score.to(dtype)))
