"""RosePO: DPO that smooths each preference by how likely it is the wrong way round.

Axes:
    B  users

Reference: Liao et al., "RosePO: Aligning LLM-based Recommenders with Human Values", https://arxiv.org/abs/2410.12519.
The paper's epsilon is personal and comes from a preference oracle; here the auxiliary recommender is that oracle.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import logsigmoid

from recray.objectives.terms import checked_beta, lead


def rosepo_loss(
    positive_score: Float[Tensor, " B"],
    negative_score: Float[Tensor, " B"],
    confidence: Float[Tensor, " B"],
    usable: Bool[Tensor, " B"],
    *,
    beta: float,
    smoothing: float,
) -> Float[Tensor, " B"]:
    r"""Return one loss per user, unreduced.

        loss_i = -(1 - eps_i) log sigmoid(d_i) - eps_i log sigmoid(-d_i),   d_i = beta * (q_pi - q_di)
        eps_i  = smoothing * (1/2 - confidence_i)

    How epsilon follows from the oracle is left open by what we know of the paper. Ours is linear: 0 for a negative that
    the auxiliary recommender is sure of, `smoothing` for one that it has the user like better than all of its sample.

    Args:
        positive_score: [B] log-ratio against the reference of the positive, in nats.
        negative_score: [B] the same of the negative.
        confidence: [B] that it is a true negative, -1/2 to 1/2.
        usable: [B] whether there is one.
        beta: Inverse temperature of the implicit reward; must be positive.
        smoothing: Most that a preference is doubted, 0 to 1/2, where nothing would be left of it. 0 makes this DPO.

    Returns:
        [B] loss in nats, float32 or wider; 0 and no gradient where not usable.

    Raises:
        ValueError: If beta is not positive.

    >>> sure = torch.tensor([0.5])
    >>> rosepo_loss(torch.zeros(1), torch.zeros(1), sure, torch.tensor([True]), beta=1.0, smoothing=0.3)
    tensor([0.6931])
    """
    ahead = checked_beta(beta) * lead(positive_score, negative_score, usable)
    doubt = torch.where(usable, smoothing * (0.5 - confidence.to(ahead.dtype)), 0.0)
    loss = -(1 - doubt) * logsigmoid(ahead) - doubt * logsigmoid(-ahead)
    return torch.where(usable, loss, 0.0)
