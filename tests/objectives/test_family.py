"""DPO, S-DPO and the cross-entropy control: values, definitions, and what turns one into another."""

import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from recray.objectives.cross_entropy import candidate_cross_entropy
from recray.objectives.dpo import dpo_loss
from recray.objectives.registry import OBJECTIVES, ScoreBatch
from recray.objectives.sdpo import sdpo_loss

BETA = 0.7


def scores(users: int = 3, negatives: int = 4) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(0)
    positive = torch.randn(users, generator=rng, dtype=torch.float64)
    return positive, torch.randn(users, negatives, generator=rng, dtype=torch.float64)


def test_dpo_by_hand() -> None:
    # sigma(ln 3) = 3/4.
    loss = dpo_loss(torch.tensor([math.log(3.0)]), torch.tensor([0.0]), beta=1.0)
    assert_close(loss, torch.tensor([-math.log(0.75)]))


def test_sdpo_by_hand() -> None:
    # Negatives at e^0 and e^{ln 2} against e^0: ln(1 + 1 + 2).
    loss = sdpo_loss(torch.tensor([0.0]), torch.tensor([[0.0, math.log(2.0)]]), beta=1.0)
    assert_close(loss, torch.tensor([math.log(4.0)]))


def test_sdpo_is_its_definition() -> None:
    positive, negative = scores()
    for i in range(3):
        total = sum(math.exp(BETA * (d - positive[i].item())) for d in negative[i].tolist())
        expected = -math.log(1 / (1 + math.exp(math.log(total))))
        assert sdpo_loss(positive, negative, beta=BETA)[i].item() == pytest.approx(expected, rel=1e-12)


def test_sdpo_with_one_negative_is_dpo() -> None:
    positive, negative = scores(negatives=1)
    assert_close(sdpo_loss(positive, negative, beta=BETA), dpo_loss(positive, negative[:, 0], beta=BETA))


@pytest.mark.parametrize("negatives", [1, 3, 15])
def test_where_policy_and_reference_agree_the_loss_counts_candidates(negatives: int) -> None:
    zeros = torch.zeros(2, dtype=torch.float64)
    assert_close(sdpo_loss(zeros, torch.zeros(2, negatives).double(), beta=BETA), zeros + math.log(1 + negatives))
    assert_close(dpo_loss(zeros, zeros, beta=BETA), zeros + math.log(2))


def test_cross_entropy_is_sdpo_without_a_reference() -> None:
    positive, negative = scores()
    assert_close(candidate_cross_entropy(positive, negative), sdpo_loss(positive, negative, beta=1.0))


def test_gradients_match_finite_differences() -> None:
    positive, negative = (t.requires_grad_() for t in scores())
    torch.autograd.gradcheck(lambda p, n: sdpo_loss(p, n, beta=BETA), (positive, negative))
    torch.autograd.gradcheck(lambda p, n: dpo_loss(p, n[:, 0], beta=BETA), (positive, negative))
    torch.autograd.gradcheck(candidate_cross_entropy, (positive, negative))


@pytest.mark.parametrize("gap", [-1e37, 1e37])
def test_extreme_scores_stay_finite(gap: float) -> None:
    negative = torch.full((1, 2), gap, requires_grad=True)
    positive = torch.zeros(1)
    for loss in (sdpo_loss(positive, negative, beta=1.0), dpo_loss(positive, negative[:, 0], beta=1.0)):
        assert loss.isfinite().all()
        (gradient,) = torch.autograd.grad(loss.sum(), negative)
        assert gradient.isfinite().all()


@pytest.mark.parametrize("beta", [0.0, -1.0])
def test_beta_must_be_positive(beta: float) -> None:
    positive, negative = scores()
    with pytest.raises(ValueError, match="beta must be positive"):
        sdpo_loss(positive, negative, beta=beta)
    with pytest.raises(ValueError, match="beta must be positive"):
        dpo_loss(positive, negative[:, 0], beta=beta)


def batch_of(score: Tensor, place: Tensor, *, own_only: bool) -> ScoreBatch:
    owners, negatives = score.shape[0], score.shape[1] - 1
    usable = torch.ones(len(place), owners, negatives, dtype=torch.bool)
    if own_only:
        usable &= (place[:, None] == torch.arange(owners))[:, :, None]
    return ScoreBatch(score, score[:, 1:], place, usable, torch.zeros(usable.shape, dtype=score.dtype))


def test_registered_objectives_read_the_users_own_rows() -> None:
    positive, negative = scores(users=4)
    score = torch.cat([positive[:, None], negative], dim=1)
    place = torch.tensor([3, 1])
    batch = batch_of(score, place, own_only=True)
    expected = sdpo_loss(positive[place], negative[place], beta=BETA)
    assert_close(OBJECTIVES["sdpo"](batch, beta=BETA), expected)
    assert_close(OBJECTIVES["napo"](batch, beta=BETA), expected)
    assert_close(OBJECTIVES["dpo"](batch, beta=BETA), dpo_loss(positive[place], negative[place, 0], beta=BETA))


def test_the_detached_pool_gives_negatives_no_gradient_and_the_positive_the_same() -> None:
    positive, negative = scores(users=4)
    score = torch.cat([positive[:, None], negative], dim=1).requires_grad_()
    batch = batch_of(score, torch.arange(4), own_only=False)
    (whole,) = torch.autograd.grad(OBJECTIVES["napo"](batch, beta=BETA).sum(), score)
    released = batch._replace(pool=score[:, 1:].detach())
    (cut,) = torch.autograd.grad(OBJECTIVES["napo"](released, beta=BETA).sum(), score)
    assert (whole[:, 1:] != 0).all()
    assert (cut[:, 1:] == 0).all()
    assert_close(cut[:, 0], whole[:, 0])
