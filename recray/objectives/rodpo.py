"""RoDPO: DPO against a negative drawn at random from what the model itself ranks highest, beside cross-entropy.

Axes:
    B  users
    N  negatives drawn for each

Reference: RoDPO, https://arxiv.org/abs/2603.29259, whose equations we could not read. Ours are from its description; of
its mixture of experts over text and images there is nothing here.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import logsigmoid

from recray.objectives.terms import checked_beta, lead, nll_anchor


def rodpo_loss(
    positive_score: Float[Tensor, " B"],
    negative_score: Float[Tensor, "B N"],
    policy_positive: Float[Tensor, " B"],
    policy_negative: Float[Tensor, "B N"],
    draw: Float[Tensor, " B"],
    usable: Bool[Tensor, "B N"],
    *,
    beta: float,
    preference_weight: float,
    pool_size: int,
    nll_weight: float,
) -> Float[Tensor, " B"]:
    r"""Return one loss per user, unreduced.

        loss_i = nll_weight * -s_pi + preference_weight * -log sigmoid(beta * (q_pi - q_ij))

    with j drawn uniformly from the `pool_size` usable negatives of the highest policy score. The cross-entropy of a
    language model over all items is its negative log-probability of the positive. The paper's pool is the top of the
    catalogue, made anew now and then; ours is the top of the row's own negatives by the scores of this very step, so
    what the sampler draws decides how hard it is.

    Args:
        positive_score: [B] log-ratio against the reference of the positive, in nats.
        negative_score: [B, N] the same of each negative.
        policy_positive: [B] `log pi(item | prompt)` of the positive, in nats.
        policy_negative: [B, N] the same of each negative: the pool is chosen by it.
        draw: [B] uniform in [0, 1): which of the pool is taken.
        usable: [B, N] which negatives count.
        beta: Inverse temperature of the implicit reward; must be positive.
        preference_weight: lambda, of the preference beside the cross-entropy.
        pool_size: K, 1 takes the hardest negative; as many as there are takes any.
        nll_weight: Of the cross-entropy; 1 in the paper.

    Returns:
        [B] loss in nats, float32 or wider; 0 and no gradient where no negative is usable, of the cross-entropy neither.

    Raises:
        ValueError: If beta is not positive.
    """
    index = drawn_from_top(policy_negative, draw, usable, pool_size=pool_size)
    some = usable.any(dim=1)
    drawn = negative_score.gather(1, index[:, None])[:, 0]
    loss = -logsigmoid(checked_beta(beta) * lead(positive_score, drawn, some))
    return preference_weight * torch.where(some, loss, 0.0) + nll_weight * nll_anchor(policy_positive, some)


def drawn_from_top(
    score: Float[Tensor, "B N"], draw: Float[Tensor, " B"], usable: Bool[Tensor, "B N"], *, pool_size: int
) -> Int[Tensor, " B"]:
    """Return the place of one of each user's `pool_size` highest usable scores; 0 for a user who has none."""
    order = score.detach().masked_fill(~usable, -torch.inf).sort(dim=1, descending=True, stable=True).indices
    pool = usable.sum(dim=1).clamp(1, pool_size)
    # The product may round up to the size itself.
    taken = torch.minimum((draw * pool).long(), pool - 1)
    return order.gather(1, taken[:, None])[:, 0]
