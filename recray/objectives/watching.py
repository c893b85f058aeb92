"""Which negatives the gradient goes to, and how far the positive leads those of each rank.

Axes:
    G  users of the global batch
    N  negatives drawn for each of those
    K  candidates: the positive, then the N negatives

Reference: DynamicPO, https://arxiv.org/abs/2605.00327, blames easy negatives for what it calls preference optimization
collapse: they keep the gradient from those near the boundary.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from recray.objectives.dynamicpo import boundary_negatives

RANKS = {"hardest": 0.0, "q25": 0.25, "q50": 0.5, "q75": 0.75, "easiest": 1.0}  # shares of the negatives ranked above
WATCHED = ("boundary_gradient", "easy_gradient", *(f"margin_{rank}" for rank in RANKS))


@torch.no_grad()
def watched(
    policy: Float[Tensor, "G K"], reward: Float[Tensor, "G K"], gradient: Float[Tensor, "G K"]
) -> Float[Tensor, " W"]:
    """Return what is to be watched over a global batch, in the order of `WATCHED`.

    First the shares of the gradient's absolute sum over all negatives that DynamicPO's boundary and the others get;
    both 0 where no negative gets any. Then the mean lead of the positive's reward over the negative of each rank, which
    is by policy score among those of one user.

    Args:
        policy: [G, K] `log pi(item | prompt)`, nats.
        reward: [G, K] beta times the log-ratio.
        gradient: [G, K] of the global loss, with respect to scores.
    """
    negative = policy[:, 1:]
    boundary = boundary_negatives(policy[:, 0], negative, torch.ones_like(negative, dtype=torch.bool))
    size = gradient[:, 1:].abs()
    total = size.sum().clamp_min(torch.finfo(size.dtype).tiny)
    shares = [(size * part).sum() / total for part in (boundary, ~boundary)]
    ranked = reward[:, 1:].gather(1, negative.argsort(dim=1, descending=True, stable=True))
    ahead = (reward[:, :1] - ranked).mean(dim=0)
    places = [round(share * (negative.shape[1] - 1)) for share in RANKS.values()]
    return torch.stack([*shares, *(ahead[place] for place in places)])
