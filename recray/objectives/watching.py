"""Which negatives the gradient goes to, and how far the positive leads those of each rank.

Axes:
    G  users of the global batch
    N  negatives drawn for each of those
    K  candidates: the positive, then the N negatives
    C  the same and then items that the user borrows, padded

Reference: DynamicPO, https://arxiv.org/abs/2605.00327, blames easy negatives for what it calls preference optimization
collapse: they keep the gradient from those near the boundary.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from recray.objectives.dynamicpo import boundary_negatives

RANKS = {"hardest": 0.0, "q25": 0.25, "q50": 0.5, "q75": 0.75, "easiest": 1.0}  # shares of the negatives ranked above
WATCHED = ("boundary_gradient", "easy_gradient", *(f"margin_{rank}" for rank in RANKS))


@torch.no_grad()
def watched(
    policy: Float[Tensor, "G C"],
    reward: Float[Tensor, "G K"],
    gradient: Float[Tensor, "G C"],
    present: Bool[Tensor, "G C"] | None = None,
) -> Float[Tensor, " W"]:
    """Return what is to be watched over a global batch, in the order of `WATCHED`.

    First the shares of the gradient's absolute sum over all negatives that DynamicPO's boundary and the others get;
    both 0 where no negative gets any. Then the mean lead of the positive's reward over the negative of each rank, which
    is by policy score among those drawn for one user.

    Args:
        policy: [G, C] `log pi(item | prompt)`, nats.
        reward: [G, K] beta times the log-ratio.
        gradient: [G, C] of the global loss, with respect to scores; 0 for padding.
        present: [G, C] what is no padding. None: all.
    """
    some = torch.ones_like(policy, dtype=torch.bool) if present is None else present
    boundary = boundary_negatives(policy[:, 0], policy[:, 1:], some[:, 1:])
    negative = policy[:, 1 : reward.shape[1]]
    size = gradient[:, 1:].abs()
    total = size.sum().clamp_min(torch.finfo(size.dtype).tiny)
    shares = [(size * part).sum() / total for part in (boundary, ~boundary)]
    ranked = reward[:, 1:].gather(1, negative.argsort(dim=1, descending=True, stable=True))
    ahead = (reward[:, :1] - ranked).mean(dim=0)
    places = [round(share * (negative.shape[1] - 1)) for share in RANKS.values()]
    return torch.stack([*shares, *(ahead[place] for place in places)])
