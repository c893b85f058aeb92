"""Who may borrow whose negatives.

Axes:
    B  users whose loss is computed (borrowers)
    G  users of the global batch (owners)
    N  negatives drawn for each of those
    D  width of user vectors

Reference: Ding et al., https://arxiv.org/abs/2508.09653. The release takes the top int(rho * (G - 1)) owners by raw dot
product and has no guard against borrowing an item that the borrower likes.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import normalize

ELEMENTS_AT_ONCE = 2**22  # of [B, G, N] worked on together; at 42 bytes each, 170 MiB


def similarity(borrower: Float[Tensor, "B D"], owner: Float[Tensor, "G D"], *, cosine: bool) -> Float[Tensor, "B G"]:
    """Return the cosine or the dot product of every borrower's vector with every owner's."""
    if cosine:
        borrower, owner = normalize(borrower, dim=1), normalize(owner, dim=1)
    return products(borrower, owner)


def products(left: Float[Tensor, "B D"], right: Float[Tensor, "K D"]) -> Float[Tensor, "B K"]:
    """Return `left @ right.T`, each row the same to the last bit in whatever company it is.

    A matrix product rounds a row by how many others there are. Who is similar and what is liked less than the sample
    are matters of order, so the last bit would make them depend on how a global batch is cut.
    """
    return torch.stack([right @ row.clone() for row in left]) if len(left) else left @ right.T


def borrower_chunks(borrowers: int, owners: int, negatives: int) -> list[slice]:
    """Return which of B borrowers to take together: as many as make `ELEMENTS_AT_ONCE` of [B, G, N], one at least."""
    each = max(1, ELEMENTS_AT_ONCE // max(1, owners * negatives))
    return [slice(first, min(borrowers, first + each)) for first in range(0, borrowers, each)]


def own_only(place: Int[Tensor, " B"], owners: int) -> Bool[Tensor, "B G"]:
    """Return that everyone lends to itself alone; `place` is each borrower's place among the owners."""
    return place[:, None] == torch.arange(owners, device=place.device)


def top_fraction(
    similar: Float[Tensor, "B G"],
    place: Int[Tensor, " B"],
    user: Int[Tensor, " G"],
    *,
    fraction: float,
) -> Bool[Tensor, "B G"]:
    """Return who lends to whom: oneself, and the int(fraction * (G - 1)) most similar other users.

    Rows of the borrower's own user (an earlier or later history of the same person) never lend; they still take no
    one's place, so fewer may lend when fewer are left. Ties go to the earlier row.
    """
    count = int(fraction * (similar.shape[1] - 1))
    same_user = user[place][:, None] == user
    ranked = similar.masked_fill(same_user, -torch.inf).sort(dim=1, descending=True, stable=True).indices
    lends = torch.zeros_like(same_user).scatter(1, ranked[:, :count], True)
    return (lends & ~same_user) | own_only(place, similar.shape[1])


def above_threshold(
    similar: Float[Tensor, "B G"],
    place: Int[Tensor, " B"],
    user: Int[Tensor, " G"],
    *,
    threshold: float,
) -> Bool[Tensor, "B G"]:
    """Return who lends to whom: oneself, and every other user at least as similar as `threshold`."""
    same_user = user[place][:, None] == user
    return ((similar >= threshold) & ~same_user) | own_only(place, similar.shape[1])


def usable_negatives(
    lends: Bool[Tensor, "B G"],
    forbidden: Bool[Tensor, "B G N"] | None,
    place: Int[Tensor, " B"],
    negatives: int,
) -> Bool[Tensor, "B G N"]:
    """Return which negative of which owner each borrower may use.

    `forbidden` marks items that the borrower met in training or is itself being taught (its positive); own negatives
    stay usable, their sampler has seen to them. None: no guard, as released.
    """
    usable = lends[:, :, None].expand(-1, -1, negatives)
    if forbidden is None:
        return usable
    own = own_only(place, lends.shape[1])[:, :, None]
    return usable & (own | ~forbidden)


def near_items(confidence: Float[Tensor, "*shape"], *, threshold: float) -> Bool[Tensor, "*shape"]:
    """Return which items lie so near to the user that it likely likes them: confidence below the threshold.

    Confidence is a percentile (`recray.objectives.margins.confidence`), so that one threshold means the same for every
    user: at -0.4, items that are liked more than nine tenths of the catalogue are.
    """
    return confidence < threshold
