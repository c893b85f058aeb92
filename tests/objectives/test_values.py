"""Values by hand, and what turns one objective into another."""

import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from recray.objectives.bpr import bpr_loss
from recray.objectives.cpo import cpo_loss
from recray.objectives.cross_entropy import candidate_cross_entropy
from recray.objectives.dmpo import dmpo_loss
from recray.objectives.dpo import dpo_loss
from recray.objectives.mppo import mppo_loss
from recray.objectives.napo import napo_loss
from recray.objectives.recpo import recpo_loss
from recray.objectives.rodpo import drawn_from_top, rodpo_loss
from recray.objectives.rosepo import rosepo_loss
from recray.objectives.sdpo import sdpo_loss
from recray.objectives.simpo import simpo_loss

BETA = 0.7
LN2, LN3 = math.log(2), math.log(3)


def row(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def usable_as(score: Tensor) -> Tensor:
    return torch.ones_like(score, dtype=torch.bool)


def scores(users: int = 3, negatives: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    rng = torch.Generator().manual_seed(0)
    positive = -4 * torch.rand(users, generator=rng, dtype=torch.float64)
    negative = -4 * torch.rand(users, negatives, generator=rng, dtype=torch.float64)
    return positive, negative, usable_as(negative)


# -- by hand: sigma(ln 3) = 3/4 ----------------------------------------------------------------


def test_dpo() -> None:
    assert_close(dpo_loss(row(LN3), row(0), usable_as(row(0)), beta=1.0), row(-math.log(3 / 4)))


def test_sdpo() -> None:
    # Negatives at e^0 and e^ln 2 against e^0: ln(1 + 1 + 2).
    negative = row(0, LN2)[None]
    assert_close(sdpo_loss(row(0), negative, usable_as(negative), beta=1.0), row(math.log(4)))


def test_cross_entropy() -> None:
    # e^ln 2 among itself, 1 and 3: a third. At beta 2: 4 among 4, 1 and 9.
    negative = row(0, LN3)[None]
    assert_close(candidate_cross_entropy(row(LN2), negative, usable_as(negative), beta=1.0), row(LN3))
    assert_close(candidate_cross_entropy(row(LN2), negative, usable_as(negative), beta=2.0), row(math.log(14 / 4)))


def test_cpo() -> None:
    # A lead of ln 3, and twice the positive's 5 nats.
    loss = cpo_loss(row(-5), row(-5 - LN3), usable_as(row(0)), beta=1.0, nll_weight=2.0)
    assert_close(loss, row(-math.log(3 / 4) + 10))


def test_simpo() -> None:
    # Twice a lead of ln 3 less a margin of ln 3 leaves ln 3. A margin is outside beta and lowers what is left.
    loss = simpo_loss(row(-1), row(-1 - LN3), usable_as(row(0)), beta=2.0, target_margin=LN3)
    assert_close(loss, row(-math.log(3 / 4)))


def test_dmpo() -> None:
    # Leads of 3 ln 3 and -ln 3: the mean is ln 3.
    negative = row(-3 * LN3, LN3)[None]
    assert_close(dmpo_loss(row(0), negative, usable_as(negative), beta=1.0), row(-math.log(3 / 4)))
    one_more = torch.cat([negative, row(99)[None]], dim=1)
    assert_close(dmpo_loss(row(0), one_more, row(1, 1, 0)[None].bool(), beta=1.0), row(-math.log(3 / 4)))


def test_mppo() -> None:
    # Probabilities 0.8 against 0.5 and 0.1: 0.3 + 0.7 = 1, a sum and not a mean.
    negative = row(math.log(0.5), math.log(0.1))[None]
    loss = mppo_loss(row(math.log(0.8)), negative, usable_as(negative), beta=1.0)
    assert_close(loss, row(math.log(1 + math.exp(-1))))


def test_rosepo() -> None:
    # Confidence 0: half of a smoothing of 0.4. Sure of it: none. Sure that it is liked: all.
    right, wrong = -math.log(3 / 4), -math.log(1 / 4)
    for sure, doubt in ((0.0, 0.2), (0.5, 0.0), (-0.5, 0.4)):
        loss = rosepo_loss(row(LN3), row(0), row(sure), usable_as(row(0)), beta=1.0, smoothing=0.4)
        assert_close(loss, row((1 - doubt) * right + doubt * wrong))


def test_recpo() -> None:
    # Two negatives level with the positive, gaps 1 and 1/2 at 2 ln 2: ln(1 + 4 + 2).
    negative = row(0, 0)[None]
    loss = recpo_loss(row(0), negative, row(1, 0.5)[None], usable_as(negative), beta=3.0, gap_weight=2 * LN2)
    assert_close(loss, row(math.log(7)))


def test_bpr() -> None:
    # Losses ln 2 and -ln 3/4; their mean, where DMPO would have the loss of the mean lead.
    negative = row(0, -LN3)[None]
    loss = bpr_loss(row(0), negative, usable_as(negative), beta=1.0)
    assert_close(loss, row((LN2 - math.log(3 / 4)) / 2))


def test_rodpo() -> None:
    # The two highest are the third and the first; a draw below a half takes the higher.
    policy, ratio = row(-2, -9, -1, -9)[None], row(0, 50, -LN3, 50)[None]
    for draw, expected in ((0.49, -math.log(3 / 4)), (0.5, LN2)):
        loss = rodpo_loss(
            row(0),
            ratio,
            row(-7),
            policy,
            row(draw),
            usable_as(policy),
            beta=1.0,
            preference_weight=3.0,
            pool_size=2,
            nll_weight=1.0,
        )
        assert_close(loss, row(3 * expected + 7))


def test_what_rodpo_draws_is_uniform_over_the_top_and_never_unusable() -> None:
    rng = torch.Generator().manual_seed(0)
    score = torch.randn(1, 8, generator=rng).expand(12_000, 8)
    usable = torch.ones_like(score, dtype=torch.bool)
    usable[:, 3] = False
    draw = torch.rand(12_000, generator=rng)
    counts = drawn_from_top(score, draw, usable, pool_size=3).bincount(minlength=8)
    top = score[0].masked_fill(~usable[0], -torch.inf).topk(3).indices
    assert counts[top].sum() == 12_000
    assert (counts[top] - 4000).abs().max() < 4 * math.sqrt(12_000 * 2 / 9)
    # The draw nearest 1 is the last of the pool, also where float32 rounds the product up to the pool's size.
    last = torch.full((1,), 1 - 2**-24)
    assert (
        drawn_from_top(score[:1], last, usable[:1], pool_size=7).item()
        == score[0].masked_fill(~usable[0], torch.inf).argmin()
    )


# -- what turns one into another -------------------------------------------------------------


def test_with_one_negative_all_of_these_are_dpo() -> None:
    positive, negative, usable = scores(negatives=1)
    dpo = dpo_loss(positive, negative[:, 0], usable[:, 0], beta=BETA)
    for loss in (sdpo_loss, dmpo_loss, bpr_loss, candidate_cross_entropy):
        assert_close(loss(positive, negative, usable, beta=BETA), dpo)


def test_without_what_makes_them_other_these_are_dpo_too() -> None:
    positive, negative, usable = scores()
    first = (positive, negative[:, 0], usable[:, 0])
    dpo = dpo_loss(*first, beta=BETA)
    assert_close(cpo_loss(*first, beta=BETA, nll_weight=0.0), dpo)
    assert_close(simpo_loss(*first, beta=BETA, target_margin=0.0), dpo)
    sure = torch.zeros_like(positive)
    assert_close(rosepo_loss(*first[:2], sure, first[2], beta=BETA, smoothing=0.0), dpo)
    hardest = dpo_loss(positive, negative.amax(dim=1), usable[:, 0], beta=BETA)
    rodpo = {"beta": BETA, "preference_weight": 1.0, "pool_size": 1, "nll_weight": 0.0}
    assert_close(rodpo_loss(positive, negative, positive, negative, 0 * positive + 0.9, usable, **rodpo), hardest)


def test_cross_entropy_is_sdpo_on_the_same_scores() -> None:
    positive, negative, usable = scores()
    usable[1, 2] = False
    assert_close(
        candidate_cross_entropy(positive, negative, usable, beta=BETA), sdpo_loss(positive, negative, usable, beta=BETA)
    )


def test_recpo_is_sdpo_without_a_weight_and_napo_on_ones_own_with_one() -> None:
    positive, negative, usable = scores()
    gap = torch.rand(negative.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    sdpo = sdpo_loss(positive, negative, usable, beta=BETA)
    assert_close(recpo_loss(positive, negative, gap, usable, beta=BETA, gap_weight=0.0), sdpo)
    own = torch.eye(3, dtype=torch.bool)[:, :, None].expand(3, 3, 4)
    margin = (2 * gap)[:, None].expand(3, 3, 4)
    napo = napo_loss(positive, negative, margin, own, beta=BETA)
    assert_close(recpo_loss(positive, negative, gap, usable, beta=BETA, gap_weight=2.0), napo)


@pytest.mark.parametrize("negatives", [1, 3, 15])
def test_where_policy_and_reference_agree(negatives: int) -> None:
    zeros, negative = torch.zeros(2, dtype=torch.float64), torch.zeros(2, negatives, dtype=torch.float64)
    usable = usable_as(negative)
    assert_close(sdpo_loss(zeros, negative, usable, beta=BETA), zeros + math.log(1 + negatives))
    for loss in (dmpo_loss, bpr_loss, mppo_loss):
        assert_close(loss(zeros, negative, usable, beta=BETA), zeros + LN2)
    sure = zeros - 0.2
    assert_close(dpo_loss(zeros, zeros, usable[:, 0], beta=BETA), zeros + LN2)
    assert_close(rosepo_loss(zeros, zeros, sure, usable[:, 0], beta=BETA, smoothing=0.4), zeros + LN2)


def test_sdpo_as_released_overflows() -> None:
    negative, usable = torch.tensor([[100.0, 0.0]]), torch.ones(1, 2, dtype=torch.bool)
    assert (-torch.sigmoid(-negative.exp().sum(dim=1).log()).log()).isinf().all()
    assert_close(sdpo_loss(torch.zeros(1), negative, usable, beta=1.0), torch.tensor([100.0]))


def test_the_mean_of_losses_is_more_than_the_loss_of_the_mean() -> None:
    # By Jensen, BPR is at least DMPO, and is more wherever leads differ.
    positive, negative, usable = scores()
    assert (bpr_loss(positive, negative, usable, beta=BETA) > dmpo_loss(positive, negative, usable, beta=BETA)).all()


def test_a_score_above_zero_is_no_log_probability_and_counts_as_zero() -> None:
    negative = row(-1.0, 1e4)[None].requires_grad_()
    loss = mppo_loss(row(0.0), negative, usable_as(negative), beta=1.0)
    assert_close(loss, row(math.log(1 + math.exp(-(1 - math.exp(-1))))))
    (found,) = torch.autograd.grad(loss.sum(), negative)
    assert found[0, 1] == 0 < found[0, 0]


def test_bfloat16_scores_are_subtracted_in_float32() -> None:
    # Both inputs are exact in bf16; their difference, 39.699, is not: bf16 would say 39.75.
    positive, negative = torch.tensor([-40.0]).bfloat16(), torch.tensor([[-0.30078125]]).bfloat16()
    for loss in (sdpo_loss, dmpo_loss, bpr_loss, candidate_cross_entropy):
        found = loss(positive, negative, usable_as(negative), beta=1.0)
        assert_close(found, torch.tensor([40.0 - 0.30078125]))
