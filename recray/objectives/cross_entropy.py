"""Cross-entropy over the same candidates: the honest control of every preference objective.

Axes:
    B  users
    N  negatives drawn for each

Reference: Jean et al., "On Using Very Large Target Vocabulary for Neural Machine Translation",
https://arxiv.org/abs/1412.2007, section 3 (sampled softmax). Here without a correction for the sampler.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import cross_entropy

from recray.objectives.terms import checked_beta, wide


def candidate_cross_entropy(
    positive_score: Float[Tensor, " B"],
    negative_score: Float[Tensor, "B N"],
    usable: Bool[Tensor, "B N"],
    *,
    beta: float,
) -> Float[Tensor, " B"]:
    r"""Return -log softmax of the positive among itself and its negatives, one loss per user.

    Args:
        positive_score: [B] `log pi(item | prompt)` of the positive, in nats; or its log-ratio.
        negative_score: [B, N] the same of each negative.
        usable: [B, N] which negatives count.
        beta: Inverse temperature of the softmax; must be positive.

    Returns:
        [B] loss in nats, float32 or wider; 0 and no gradient where no negative is usable.

    Raises:
        ValueError: If beta is not positive.

    >>> candidate_cross_entropy(torch.zeros(1), torch.zeros(1, 3), torch.ones(1, 3, dtype=torch.bool), beta=1.0)
    tensor([1.3863])
    """
    negative = wide(negative_score).masked_fill(~usable, -torch.inf)
    logits = checked_beta(beta) * torch.cat([wide(positive_score)[:, None], negative], dim=1)
    target = torch.zeros(logits.shape[0], dtype=torch.int64, device=logits.device)
    return cross_entropy(logits, target, reduction="none")
