"""S-DPO: DPO with a softmax over several negatives.

Axes:
    B  users
    N  negatives drawn for each

Reference: Chen et al., "On Softmax Direct Preference Optimization for Recommendation",
https://arxiv.org/abs/2406.09215, equation 9.
"""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad


def sdpo_loss(
    positive_score: Float[Tensor, " B"], negative_score: Float[Tensor, "B N"], *, beta: float
) -> Float[Tensor, " B"]:
    r"""Return one loss per user, unreduced.

        loss_i = -log sigmoid(-log sum_n exp(beta * (q_in - q_pi)))

    which is ln(1 + sum_n exp(...)): computed as a log-sum-exp with the positive's own logit 0 in it, where the release
    takes `log(sum(exp))`, which overflows. With N = 1 this is DPO.

    Args:
        positive_score: [B] log-ratio against the reference of the positive, in nats.
        negative_score: [B, N] the same of each negative.
        beta: Inverse temperature of the implicit reward; must be positive.

    Returns:
        [B] loss in nats, float32 or wider. ln(1 + N) where policy and reference agree.

    Raises:
        ValueError: If beta is not positive.

    >>> sdpo_loss(torch.zeros(1), torch.zeros(1, 3), beta=1.0)
    tensor([1.3863])
    """
    if beta <= 0:
        raise ValueError(f"beta must be positive, got {beta}; beta=0 ignores the policy")
    # bf16 would round the difference of two scores near -40 to a quarter of a nat.
    dtype = torch.promote_types(positive_score.dtype, torch.float32)
    logits = beta * (negative_score.to(dtype) - positive_score.to(dtype)[:, None])
    return pad(logits, (1, 0), value=0.0).logsumexp(dim=1)
