"""S-DPO: DPO with a softmax over several negatives.

Axes:
    B  users
    N  negatives drawn for each

Reference: Chen et al., "On Softmax Direct Preference Optimization for Recommendation",
https://arxiv.org/abs/2406.09215, equation 9.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import pad

from recray.objectives.terms import checked_beta, lead


def sdpo_loss(
    positive_score: Float[Tensor, " B"],
    negative_score: Float[Tensor, "B N"],
    usable: Bool[Tensor, "B N"],
    *,
    beta: float | Float[Tensor, "B N"],
) -> Float[Tensor, " B"]:
    r"""Return one loss per user, unreduced.

        loss_i = -log sigmoid(-log sum_n exp(beta * (q_in - q_pi)))

    which is ln(1 + sum_n exp(...)): computed as a log-sum-exp with the positive's own logit 0 in it, where the release
    takes `log(sum(exp))`, which overflows. With N = 1 this is DPO.

    Args:
        positive_score: [B] log-ratio against the reference of the positive, in nats.
        negative_score: [B, N] the same of each negative.
        usable: [B, N] which negatives count.
        beta: Inverse temperature of the implicit reward; must be positive. One a negative: DynamicPO's.

    Returns:
        [B] loss in nats, float32 or wider. ln(1 + N) where policy and reference agree; 0 and no gradient where no
        negative is usable.

    Raises:
        ValueError: If beta is not positive.

    >>> sdpo_loss(torch.zeros(1), torch.zeros(1, 3), torch.ones(1, 3, dtype=torch.bool), beta=1.0)
    tensor([1.3863])
    """
    logits = -checked_beta(beta) * lead(positive_score[:, None], negative_score, usable)
    return pad(logits.masked_fill(~usable, -torch.inf), (1, 0), value=0.0).logsumexp(dim=1)
