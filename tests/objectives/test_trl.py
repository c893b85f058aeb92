"""Losses that TRL has as well, against values of its own code; TRL is no dependency.

TRL 0.19.1 on a CPU, 2026-11: `DPOTrainer.dpo_loss` with loss_type "sigmoid", label_smoothing 0 and 0.2;
`CPOTrainer.cpo_loss` with loss_type "sigmoid" and, at simpo_gamma 0.5, "simpo". Its anchor is added elsewhere and left
out. With no trainer around it, each was called on an object that has only the settings it reads.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from recray.objectives.cpo import cpo_loss
from recray.objectives.dmpo import dmpo_loss
from recray.objectives.dpo import dpo_loss
from recray.objectives.rosepo import rosepo_loss
from recray.objectives.sdpo import sdpo_loss
from recray.objectives.simpo import simpo_loss

CHOSEN = torch.tensor([-3.25, -12.5, -40.75, -1.125])
REJECTED = torch.tensor([-7.5, -11.0, -38.25, -60.5])
REFERENCE_CHOSEN = torch.tensor([-4.5, -12.75, -36.5, -2.0])
REFERENCE_REJECTED = torch.tensor([-6.25, -13.5, -39.0, -55.25])
USABLE = torch.ones(4, dtype=torch.bool)
RATIOS = CHOSEN - REFERENCE_CHOSEN, REJECTED - REFERENCE_REJECTED
OWN = RATIOS[0], RATIOS[1][:, None], USABLE[:, None]


def rosepo(beta: float) -> Tensor:
    # Smoothing at a confidence of 0 is twice what it comes to.
    return rosepo_loss(*RATIOS, torch.zeros(4), USABLE, beta=beta, smoothing=0.4)


@pytest.mark.parametrize(
    ("loss", "at_tenth", "at_one"),
    [
        (
            lambda beta: dpo_loss(*RATIOS, USABLE, beta=beta),
            [0.575939416885376, 0.8119620084762573, 0.9740769863128662, 0.43307653069496155],
            [0.07888973504304886, 2.3502066135406494, 5.006715297698975, 0.0021851020865142345],
        ),
        (
            rosepo,
            [0.6259394288063049, 0.7669620513916016, 0.8740769624710083, 0.5555765628814697],
            [0.578889787197113, 1.9002066850662231, 4.006715774536133, 1.2271851301193237],
        ),
        (
            lambda beta: cpo_loss(CHOSEN, REJECTED, USABLE, beta=beta, nll_weight=0.0),
            [0.5030574202537537, 0.7709571123123169, 0.825939416885376, 0.0026351429987698793],
            [0.014163456857204437, 1.7014132738113403, 2.578889846801758, 1.63593157930437e-26],
        ),
        (
            lambda beta: simpo_loss(CHOSEN, REJECTED, USABLE, beta=beta, target_margin=0.5),
            [0.7313501238822937, 1.070055365562439, 1.1368709802627563, 0.004340910352766514],
            [0.023245465010404587, 2.1269280910491943, 3.0485873222351074, 2.697195245487535e-26],
        ),
    ],
    ids=["dpo", "smoothed", "cpo", "simpo"],
)
def test_it_is_what_trl_computes(loss: Callable[[float], Tensor], at_tenth: list[float], at_one: list[float]) -> None:
    assert_close(loss(0.1), torch.tensor(at_tenth), rtol=1e-5, atol=1e-7)
    assert_close(loss(1.0), torch.tensor(at_one), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("loss", [sdpo_loss, dmpo_loss])
def test_with_one_negative_losses_over_several_are_what_trl_computes_of_a_pair(loss: Callable[..., Tensor]) -> None:
    expected = torch.tensor([0.07888973504304886, 2.3502066135406494, 5.006715297698975, 0.0021851020865142345])
    assert_close(loss(*OWN, beta=1.0), expected, rtol=1e-5, atol=1e-7)
