"""The five defects of NAPO's released code: each in its naive form beside ours, on the same numbers."""

import numpy as np
import torch
from torch import Tensor
from torch.testing import assert_close

from recray.config import Objective
from recray.objectives.family import Pool, ScoreBatch, losses
from recray.objectives.sharing import own_only, usable_negatives
from recray.users.ragged import from_lengths
from recray.users.sasrec import SASRec, Shape, user_vectors

OWNERS, NEGATIVES = 4, 3
NAPO = Objective(beta=0.7)


def scores() -> Tensor:
    return -3 * torch.rand(OWNERS, 1 + NEGATIVES, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def batch_of(score: Tensor, place: list[int], usable: Tensor, *, pool: Tensor | None = None) -> ScoreBatch:
    shared = Pool(score[:, 1:] if pool is None else pool, usable, torch.zeros(usable.shape, dtype=score.dtype))
    own = torch.ones(len(place), NEGATIVES, dtype=torch.bool)
    return ScoreBatch(score, score, torch.tensor(place), own, 0.0 * own, torch.zeros(len(place)), shared)


def napo(batch: ScoreBatch) -> Tensor:
    return losses(batch, "napo", NAPO.settings)


def test_1_gathered_without_gradient_no_negative_has_any() -> None:
    score = scores().requires_grad_()
    everything = torch.ones(OWNERS, OWNERS, NEGATIVES, dtype=torch.bool)
    ours, naive = (
        torch.autograd.grad(napo(batch_of(score, [0, 1, 2, 3], everything, pool=pool)).sum(), score)[0]
        for pool in (None, score[:, 1:].detach())
    )
    assert (naive[:, 1:] == 0).all()
    assert (ours[:, 1:] > 0).all()
    assert_close(ours[:, 0], naive[:, 0])
    # What is pushed up is pushed down elsewhere: only so can a softmax over one's own candidates learn.
    assert_close(ours.sum(), torch.zeros((), dtype=torch.float64), atol=1e-12, rtol=0)


def test_2_read_by_the_local_row_number_another_ranks_negatives_are_ones_own() -> None:
    # The second rank of two holds rows 2 and 3; after the gather it reads rows 0 and 1.
    score, place = scores(), [2, 3]
    ours = napo(batch_of(score, place, own_by(place)))
    gaps = score[place][:, 1:] - score[place][:, :1]
    assert_close(ours, (0.7 * gaps).exp().sum(dim=1).log1p())
    naive = napo(batch_of(score, place, own_by([0, 1])))
    assert not torch.isclose(naive, ours).any()


def own_by(rows: list[int]) -> Tensor:
    return own_only(torch.tensor(rows), OWNERS)[:, :, None].expand(-1, -1, NEGATIVES)


def test_4_padding_masked_and_read_at_a_fixed_place_short_histories_are_alike() -> None:
    # Of the third, see tests/train/test_step.py: evaluation reads no vectors and moves no average.
    shape = Shape(num_items=20, dim=8, layers=1, heads=2, max_history=10, dropout=0.0)
    model = SASRec(shape, seed=0).eval()
    histories = [[1, 2, 3], [7, 9], [4], []]
    padding, width = 19, 10
    behind = torch.tensor([history + [padding] * (width - len(history)) for history in histories])
    states = model(behind, torch.full((4,), width))[:, 1:] * (behind != padding)[:, :, None]
    assert all(torch.equal(states[0, -1], other) for other in states[1:, -1])
    items = np.array([item for history in histories for item in history], dtype=np.int32)
    ours = user_vectors(model, from_lengths(items, np.array([len(history) for history in histories])))
    apart = np.linalg.norm(ours[:, None] - ours[None], axis=2)
    assert apart[~np.eye(4, dtype=bool)].min() > 0.1


def test_5_without_a_guard_a_borrower_is_taught_against_what_it_likes() -> None:
    # User 0 may borrow from user 1, whose second negative user 0 met or is being taught.
    lends = torch.tensor([[True, True, False, False]])
    negative = np.array([[10, 11, 12], [13, 5, 14], [15, 16, 17], [18, 19, 20]])
    forbidden = torch.from_numpy(np.isin(negative, [5]))[None]
    place = torch.tensor([0])
    score = scores().requires_grad_()
    found = {}
    for name, mask in (("naive", None), ("ours", forbidden)):
        usable = usable_negatives(lends, mask, place, NEGATIVES)
        (found[name],) = torch.autograd.grad(napo(batch_of(score, [0], usable)).sum(), score)
    assert found["naive"][1, 2] > 0
    assert found["ours"][1, 2] == 0
    assert (found["ours"][1, [1, 3]] > 0).all()
