"""SimPO: a target margin between mean log-probabilities of tokens, without a reference.

Axes:
    B  users

Reference: Meng et al., "SimPO: Simple Preference Optimization with a Reference-Free Reward",
https://arxiv.org/abs/2405.14734, equation 6.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import logsigmoid

from recray.objectives.terms import checked_beta, lead


def simpo_loss(
    positive_score: Float[Tensor, " B"],
    negative_score: Float[Tensor, " B"],
    usable: Bool[Tensor, " B"],
    *,
    beta: float,
    target_margin: float,
) -> Float[Tensor, " B"]:
    r"""Return one loss per user, unreduced.

        loss_i = -log sigmoid(beta * (s_pi - s_di) - target_margin)

    Args:
        positive_score: [B] `log pi(item | prompt) / tokens of the item` of the positive, in nats a token: no reference.
        negative_score: [B] the same of the negative.
        usable: [B] whether there is one.
        beta: Inverse temperature of the implicit reward; must be positive.
        target_margin: gamma, the lead asked of the positive, in beta * nats; the paper has it at 0.3 to 1.6.

    Returns:
        [B] loss in nats, float32 or wider; 0 and no gradient where not usable.

    Raises:
        ValueError: If beta is not positive.

    >>> simpo_loss(torch.tensor([-0.5]), torch.tensor([-1.0]), torch.tensor([True]), beta=2.0, target_margin=1.0)
    tensor([0.6931])
    """
    asked = checked_beta(beta) * lead(positive_score, negative_score, usable) - target_margin
    return torch.where(usable, -logsigmoid(asked), 0.0)
