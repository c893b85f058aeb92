"""Negatives of SASRec's sampled softmax: their distribution, what the correction says of it, and that it corrects."""

import math
from typing import get_args

import numpy as np
import pytest
import torch

from recray.config import Negatives, Users
from recray.users import own_lists
from recray.users.losses import full_softmax, sampled_softmax
from recray.users.sampling import HARDEST, IN_BATCH, MIXED, proposal

COUNTS = np.array([8, 4, 2, 1, 0])
SAMPLERS = [name for name in get_args(Users.model_fields["sampler"].annotation) if name not in own_lists.SAMPLERS]


@pytest.mark.parametrize(
    ("sampler", "exponent", "weights"),
    [
        ("uniform", 1.0, [1, 1, 1, 1, 1]),
        ("popularity", 1.0, [9, 5, 3, 2, 1]),
        ("popularity", 0.5, [3, 5**0.5, 3**0.5, 2**0.5, 1]),
        ("inverse_popularity", 1.0, [1 / 9, 1 / 5, 1 / 3, 1 / 2, 1]),
        ("in_batch", 1.0, [8, 4, 2, 1, 0]),
        ("adaptive", 1.0, [8, 4, 2, 1, 0]),
        ("mixed", 1.0, [0.1 + 4 / 15, 0.1 + 2 / 15, 0.1 + 1 / 15, 0.1 + 0.5 / 15, 0.1]),
        ("adaptive_mixed", 1.0, [0.1 + 4 / 15, 0.1 + 2 / 15, 0.1 + 1 / 15, 0.1 + 0.5 / 15, 0.1]),
    ],
)
def test_chances_are_as_defined_and_drawn(sampler: str, exponent: float, weights: list[float]) -> None:
    drawing = proposal(sampler, COUNTS, 70_000, exponent=exponent, uniform_share=0.5)
    np.testing.assert_allclose(drawing.chance, np.array(weights) / np.sum(weights), rtol=1e-12)
    batch = np.repeat(np.arange(5), COUNTS)  # a batch that is like all rows together
    drawn, expected = drawing.drawn(batch, seed=0, step=1)
    share = np.bincount(drawn, minlength=5) / len(drawn)
    np.testing.assert_allclose(share, drawing.chance, atol=4 * math.sqrt(0.25 / 70_000))
    np.testing.assert_allclose(expected, np.log(70_000 * drawing.chance[drawn]), rtol=1e-6)


def test_every_sampler_of_the_settings_is_known() -> None:
    for sampler in SAMPLERS:
        assert proposal(sampler, COUNTS, 10).chance.sum() == pytest.approx(1)
    assert {*IN_BATCH, *MIXED, *HARDEST} < set(SAMPLERS)
    assert set(own_lists.SAMPLERS) < set(Negatives.samplers()) == {*SAMPLERS, *own_lists.SAMPLERS}
    with pytest.raises(ValueError, match="no sampler 'nearest' for SASRec"):
        proposal("nearest", COUNTS, 10)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_step_and_the_seed_decide_alone(sampler: str) -> None:
    drawing, batch = proposal(sampler, COUNTS, 50), np.array([0, 0, 1, 3])
    first = drawing.drawn(batch, seed=0, step=1)[0]
    np.testing.assert_array_equal(first, drawing.drawn(batch, seed=0, step=1)[0])
    assert not np.array_equal(first, drawing.drawn(batch, seed=0, step=2)[0])
    assert not np.array_equal(first, drawing.drawn(batch, seed=1, step=1)[0])


def test_in_batch_negatives_are_targets_of_the_batch_and_mixed_ones_in_part() -> None:
    batch = np.array([0, 0, 1])
    assert set(proposal("in_batch", COUNTS, 100).drawn(batch, seed=0, step=0)[0].tolist()) == {0, 1}
    drawn = proposal("mixed", COUNTS, 100, uniform_share=0.3).drawn(batch, seed=0, step=0)[0]
    assert set(drawn[30:].tolist()) == {0, 1}
    assert set(drawn[:30].tolist()) == {0, 1, 2, 3, 4}


@pytest.mark.parametrize("sampler", [sampler for sampler in SAMPLERS if sampler not in HARDEST])
def test_the_correction_makes_the_sum_unbiased_over_batches(sampler: str) -> None:
    """exp(loss) - 1 is the sum over the negatives by the positive's score; batches are drawn like all rows."""
    rng = np.random.default_rng(0)
    counts = np.array([8, 4, 2, 1, 5])
    states = torch.from_numpy(rng.normal(size=(1, 3)))
    table, target = torch.from_numpy(rng.normal(size=(5, 3))) * 0.5, torch.tensor([4])
    drawing = proposal(sampler, counts, 6)
    found = []
    for step in range(4000):
        batch = rng.choice(5, size=7, p=counts / counts.sum())
        drawn, expected = drawing.drawn(batch, seed=0, step=step)
        loss = sampled_softmax(states, table, target, torch.from_numpy(drawn), torch.from_numpy(expected).double())
        found.append(loss.exp().item())
    wanted = full_softmax(states, table, target).exp().item()
    assert np.mean(found) == pytest.approx(wanted, abs=4 * np.std(found) / math.sqrt(len(found)))
