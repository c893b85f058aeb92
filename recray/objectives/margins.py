"""From the auxiliary recommender's confidence in a negative to the margin asked of it.

Axes:
    B  users whose loss is computed (borrowers)
    G  users of the global batch (owners)
    N  negatives drawn for each of those
    C  items of a fixed sample of the catalogue
    D  width of user and item vectors

Reference: Ding et al., https://arxiv.org/abs/2508.09653; the released code has one margin a batch (`batch_margin`), the
paper's figure one a negative (`per_negative_margin`).
"""

import torch
from jaxtyping import Float
from torch import Tensor

from recray.objectives.sharing import products


def confidence(
    user_vector: Float[Tensor, "B D"], item_vector: Float[Tensor, "K D"], sample_vector: Float[Tensor, "C D"]
) -> Float[Tensor, "B K"]:
    """Return how sure the auxiliary model is that item k is a true negative for user i, in [-1/2, 1/2].

        c_ik = 1/2 - (share of the catalogue sample that user i scores below item k, ties counting half)

    A percentile, because raw scores have a scale of their own for every user. +1/2: liked less than all of the sample,
    surely a negative; -1/2: liked more than all of it, likely a false one.
    """
    score = products(user_vector, item_vector)
    sample = products(user_vector, sample_vector).sort(dim=1).values
    below = torch.searchsorted(sample, score.contiguous(), side="left")
    up_to = torch.searchsorted(sample, score.contiguous(), side="right")
    return 0.5 - (below + up_to).to(score.dtype) / (2 * sample.shape[1])


def per_negative_margin(confidence: Float[Tensor, "B G N"], *, base: float, slope: float) -> Float[Tensor, "B G N"]:
    """Return gamma_ijn = max(0, base * (1 + slope * c_ijn)), in beta * nats; c is the borrower's confidence."""
    return (base * (1 + slope * confidence)).clamp_min(0.0)


def shrunk_margin(
    margin: Float[Tensor, "*shape"], confidence: Float[Tensor, "*shape"], *, threshold: float
) -> Float[Tensor, "*shape"]:
    """Return the margin where confidence is at least the threshold; below, it falls in a straight line to 0 at -1/2.

        gamma * clamp((c + 1/2) / (threshold + 1/2), 0, 1)

    So an item that is liked more than all others is asked for no lead at all. With a threshold of -1/2 nothing shrinks.
    """
    if threshold <= -0.5:
        return margin
    return margin * ((confidence + 0.5) / (threshold + 0.5)).clamp(0.0, 1.0)


def batch_margin(mean_score: float, centre: float, *, base: float, slope: float) -> float:
    """Return the released code's one margin a batch: base * (1 - slope * (M - centre)).

    M is the mean raw auxiliary score of all negatives used and `centre` its moving average: negatives that look liked
    ask for less. Clamped at 0, which the release does not do; NaN where M is, so that the loss shows it.
    """
    margin = base * (1 - slope * (mean_score - centre))
    return 0.0 if margin < 0 else margin
