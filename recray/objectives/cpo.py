"""CPO: contrastive preference optimization, DPO without a reference but with an anchor.

Axes:
    B  users

Reference: Xu et al., "Contrastive Preference Optimization: Pushing the Boundaries of LLM Performance in Machine
Translation", https://arxiv.org/abs/2401.08417, equation 6. The anchor's weight is 1 there; here it is a setting.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import logsigmoid

from recray.objectives.terms import checked_beta, lead, nll_anchor


def cpo_loss(
    positive_score: Float[Tensor, " B"],
    negative_score: Float[Tensor, " B"],
    usable: Bool[Tensor, " B"],
    *,
    beta: float,
    nll_weight: float,
) -> Float[Tensor, " B"]:
    r"""Return one loss per user, unreduced.

        loss_i = -log sigmoid(beta * (s_pi - s_di)) - nll_weight * s_pi

    Args:
        positive_score: [B] `log pi(item | prompt)` of the positive, in nats: no reference is subtracted.
        negative_score: [B] the same of the negative.
        usable: [B] whether there is one.
        beta: Inverse temperature of the implicit reward; must be positive.
        nll_weight: Weight of the anchor, the positive's negative log-probability; 1 in the paper.

    Returns:
        [B] loss in nats, float32 or wider; 0 and no gradient where not usable, of the anchor neither.

    Raises:
        ValueError: If beta is not positive.

    >>> cpo_loss(torch.tensor([-1.0]), torch.tensor([-1.0]), torch.tensor([True]), beta=0.1, nll_weight=1.0)
    tensor([1.6931])
    """
    loss = -logsigmoid(checked_beta(beta) * lead(positive_score, negative_score, usable))
    return torch.where(usable, loss, 0.0) + nll_weight * nll_anchor(positive_score, usable)
