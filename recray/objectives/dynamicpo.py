"""DynamicPO: only the negatives near the boundary count, each with a beta of its own.

Two parts that other losses over several negatives can take, and the loss that the paper makes of them with DMPO.

Axes:
    B  users
    N  negatives drawn for each

Reference: DynamicPO, https://arxiv.org/abs/2605.00327, and its released code, which clusters with scikit-learn inside
the loss and works on Python numbers, one negative at a time. Here clustering is exact, on the device, and all users are
taken at once. Where the release divides by zero, is undefined (ties, fewer than three negatives) or depends on the
clustering's random start, we say below what is done.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import pad

from recray.objectives.dmpo import dmpo_loss
from recray.objectives.terms import checked_beta, lead, usable_mean, wide

REACH = 0.5  # beta is scaled by 1 - REACH to 1 + REACH
OFFSET = 2.0  # nats


def dynamicpo_loss(
    positive_score: Float[Tensor, " B"],
    negative_score: Float[Tensor, "B N"],
    policy_positive: Float[Tensor, " B"],
    policy_negative: Float[Tensor, "B N"],
    usable: Bool[Tensor, "B N"],
    *,
    beta: float,
) -> Float[Tensor, " B"]:
    r"""Return one loss per user, unreduced: DMPO over the boundary set H, each negative at its own beta.

        loss_i = -log sigmoid(mean_{n in H_i} beta_in * (q_pi - q_in))

    Args:
        positive_score: [B] log-ratio against the reference of the positive, in nats.
        negative_score: [B, N] the same of each negative.
        policy_positive: [B] `log pi(item | prompt)` of the positive, in nats: H and beta follow from these two.
        policy_negative: [B, N] the same of each negative.
        usable: [B, N] which negatives count.
        beta: Inverse temperature that `dual_margin_beta` scales; must be positive.

    Returns:
        [B] loss in nats, float32 or wider. Negatives outside H get no gradient, H and beta send none; 0 and no gradient
        where no negative is usable.

    Raises:
        ValueError: If beta is not positive.
    """
    boundary = boundary_negatives(policy_positive, policy_negative, usable)
    scaled = dual_margin_beta(policy_positive, policy_negative, boundary, usable, beta=beta)
    return dmpo_loss(positive_score, negative_score, boundary, beta=scaled)


@torch.no_grad()
def boundary_negatives(
    positive: Float[Tensor, " B"], negative: Float[Tensor, "B N"], usable: Bool[Tensor, "B N"]
) -> Bool[Tensor, "B N"]:
    """Return H: the negatives that the policy scores at least as high as the positive; if none, the hardest cluster.

    At least one of a user's usable negatives is in it.
    """
    above = usable & (negative >= positive[:, None])
    return torch.where(above.any(dim=1, keepdim=True), above, hardest_cluster(negative, usable))


@torch.no_grad()
def hardest_cluster(score: Float[Tensor, "B N"], usable: Bool[Tensor, "B N"]) -> Bool[Tensor, "B N"]:
    """Return the highest of the three clusters with the least squared distance to their means, exactly.

    On a line, clusters are stretches of the sorted scores, so the best two cuts are looked for: O(N^2) work, O(B N)
    memory. Equal scores are never parted. Fewer than three different scores are a cluster each. Of several best ways to
    cut, the one with the smallest highest cluster counts.
    """
    ranked = score.double().masked_fill(~usable, -torch.inf).sort(dim=1, descending=True).values
    there = ranked.isfinite()
    number = torch.arange(1, score.shape[1] + 1, device=score.device)
    count = there.sum(dim=1, keepdim=True)
    ends = ranked > pad(ranked[:, 1:], (0, 1), value=-torch.inf)  # the next one is lower
    may_cut = there & ends & (number < count)
    # Around their mean, or squares of scores near -1e4 would swallow differences near 1e-4.
    centred = torch.where(there, ranked - usable_mean(ranked, there)[:, None], 0.0)
    total = centred.cumsum(dim=1)
    rest = (total[:, -1:] - total).square() / (count - number).clamp_min(1)

    # Least distance is most of sum^2 / count, summed over clusters. What is highest ends where the best first cut is.
    lowest = torch.where(there[:, 0], ranked[:, 0], torch.inf)
    best = torch.full_like(lowest, -torch.inf)
    for cut in range(score.shape[1] - 2):
        upper = total[:, cut, None]
        below = (total - upper).square() / (number - cut - 1).clamp_min(1) + rest
        below = below.masked_fill(~(may_cut & (number > cut + 1)), -torch.inf).amax(dim=1)
        gain = upper[:, 0].square() / (cut + 1) + below
        better = may_cut[:, cut] & (gain > best)
        lowest, best = torch.where(better, ranked[:, cut], lowest), torch.where(better, gain, best)
    return usable & (score >= lowest[:, None])


@torch.no_grad()
def dual_margin_beta(
    positive: Float[Tensor, " B"],
    negative: Float[Tensor, "B N"],
    boundary: Bool[Tensor, "B N"],
    usable: Bool[Tensor, "B N"],
    *,
    beta: float,
) -> Float[Tensor, "B N"]:
    r"""Return a beta for each negative: the smaller, the further it lies above the positive and the easy ones.

        beta_in = beta * (1 + tanh((m1 - m2 - 2) / (|m1| + |m2|)) / 2),   m1 = s_pi - s_in,   m2 = s_in - mean_{E_i} s

    E is what is usable and not on the boundary; the boundary itself where that is all. Where m1 = m2 = 0, which the
    release divides by, beta_in is beta / 2: the limit of small margins. Scores are the policy's, in nats.

    Raises:
        ValueError: If beta is not positive.
    """
    easy = usable & ~boundary
    easy = torch.where(easy.any(dim=1, keepdim=True), easy, boundary)
    ahead = lead(positive[:, None], negative, usable)
    above_easy = torch.where(usable, wide(negative) - usable_mean(wide(negative), easy)[:, None], 0.0)
    size = ahead.abs() + above_easy.abs()
    pull = (ahead - above_easy - OFFSET) / size  # where size is 0, -inf, whose tanh is -1
    return checked_beta(beta) * (1 + REACH * pull.tanh())
