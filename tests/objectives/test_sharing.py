"""Who borrows from whom."""

import torch
from torch.testing import assert_close

from recray.objectives.sharing import (
    above_threshold,
    near_items,
    own_only,
    products,
    similarity,
    top_fraction,
    usable_negatives,
)

SIMILAR = torch.tensor(
    [
        [1.0, 0.9, 0.1, 0.5, 0.8],
        [0.9, 1.0, 0.2, 0.3, 0.4],
    ]
)
PLACE = torch.tensor([0, 1])
USERS = torch.arange(5)


def lenders(lends: torch.Tensor) -> list[list[int]]:
    return [row.nonzero()[:, 0].tolist() for row in lends]


def test_similarity_is_cosine_or_dot() -> None:
    a, b = torch.tensor([[3.0, 4.0]]), torch.tensor([[3.0, 4.0], [-4.0, 3.0], [0.0, 2.0]])
    assert_close(similarity(a, b, cosine=False), torch.tensor([[25.0, 0.0, 8.0]]))
    assert_close(similarity(a, b, cosine=True), torch.tensor([[1.0, 0.0, 0.8]]))


def test_the_most_similar_fraction_lends_and_oneself_always() -> None:
    # int(0.5 * 4) = 2 others each.
    assert lenders(top_fraction(SIMILAR, PLACE, USERS, fraction=0.5)) == [[0, 1, 4], [0, 1, 4]]
    assert lenders(top_fraction(SIMILAR, PLACE, USERS, fraction=0.0)) == [[0], [1]]
    assert lenders(top_fraction(SIMILAR, PLACE, USERS, fraction=1.0)) == [[0, 1, 2, 3, 4]] * 2


def test_other_rows_of_ones_own_user_never_lend() -> None:
    users = torch.tensor([7, 7, 1, 2, 3])
    assert lenders(top_fraction(SIMILAR, PLACE, users, fraction=1.0)) == [[0, 2, 3, 4], [1, 2, 3, 4]]
    assert lenders(above_threshold(SIMILAR, PLACE, users, threshold=-1.0)) == [[0, 2, 3, 4], [1, 2, 3, 4]]


def test_ties_go_to_the_earlier_row() -> None:
    assert lenders(top_fraction(torch.zeros(1, 5), torch.tensor([3]), USERS, fraction=0.5)) == [[0, 1, 3]]


def test_all_that_are_similar_enough_lend() -> None:
    assert lenders(above_threshold(SIMILAR, PLACE, USERS, threshold=0.5)) == [[0, 1, 3, 4], [0, 1]]


def test_the_guard_masks_borrowed_negatives_and_leaves_own_ones() -> None:
    lends = torch.tensor([[True, True, False]])
    forbidden = torch.tensor([[[True, False], [True, False], [False, False]]])
    place = torch.tensor([0])
    usable = usable_negatives(lends, forbidden, place, 2)
    assert usable.tolist() == [[[True, True], [False, True], [False, False]]]
    assert usable_negatives(lends, None, place, 2).tolist() == [[[True, True], [True, True], [False, False]]]


def test_near_are_items_whose_confidence_is_below_the_threshold() -> None:
    sure = torch.tensor([[-0.5, -0.4, -0.39], [0.5, 0.0, -0.41]])
    assert near_items(sure, threshold=-0.4).tolist() == [[True, False, False], [False, False, True]]
    assert not near_items(sure, threshold=-0.5).any()
    assert near_items(sure, threshold=0.5).sum() == 5


def test_own_only_is_the_identity_on_ones_places() -> None:
    assert lenders(own_only(torch.tensor([2, 0]), 3)) == [[2], [0]]


def test_a_product_is_the_same_to_the_last_bit_in_whatever_company_it_is_made() -> None:
    rng = torch.Generator().manual_seed(0)
    left, right = torch.randn(24, 16, generator=rng), torch.randn(360, 16, generator=rng)
    whole = products(left, right)
    assert_close(whole, left @ right.T)
    for size in (1, 2, 3, 5, 8, 13):
        assert torch.equal(torch.cat([products(part, right) for part in left.split(size)]), whole)
    assert products(left[:0], right).shape == (0, 360)
