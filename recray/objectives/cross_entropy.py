"""Cross-entropy over the same candidates: the honest control of every preference objective.

Axes:
    B  users
    N  negatives drawn for each

Reference: Jean et al., "On Using Very Large Target Vocabulary for Neural Machine Translation",
https://arxiv.org/abs/1412.2007, section 3 (sampled softmax). Here without a correction for the sampler.
"""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import cross_entropy


def candidate_cross_entropy(
    positive_score: Float[Tensor, " B"], negative_score: Float[Tensor, "B N"]
) -> Float[Tensor, " B"]:
    r"""Return -log softmax of the positive among itself and its negatives, one loss per user.

    Args:
        positive_score: [B] `log pi(item | prompt)` of the positive, in nats: no reference is subtracted.
        negative_score: [B, N] the same of each negative.

    Returns:
        [B] loss in nats, float32 or wider.

    >>> candidate_cross_entropy(torch.zeros(1), torch.zeros(1, 3))
    tensor([1.3863])
    """
    dtype = torch.promote_types(positive_score.dtype, torch.float32)
    logits = torch.cat([positive_score[:, None], negative_score], dim=1).to(dtype)
    target = torch.zeros(logits.shape[0], dtype=torch.int64, device=logits.device)
    return cross_entropy(logits, target, reduction="none")
