"""Confidence and the margins that follow from it."""

import pytest
import torch
from torch.testing import assert_close

from recray.objectives.margins import batch_margin, confidence, per_negative_margin, shrunk_margin


def test_confidence_is_half_minus_the_percentile() -> None:
    user = torch.tensor([[1.0]])
    sample = torch.tensor([[0.0], [1.0], [2.0], [3.0]])
    items = torch.tensor([[-1.0], [1.5], [9.0], [1.0]])
    # Below all; above two of four; above all; above one and level with one, which counts half.
    assert_close(confidence(user, items, sample), torch.tensor([[0.5, 0.0, -0.5, 0.5 - 1.5 / 4]]))


def test_confidence_does_not_depend_on_the_scale_of_a_users_vector() -> None:
    rng = torch.Generator().manual_seed(0)
    user, items, sample = (torch.randn(n, 4, generator=rng, dtype=torch.float64) for n in (3, 6, 50))
    scale = torch.tensor([[0.1], [1.0], [100.0]], dtype=torch.float64)
    assert_close(confidence(user * scale, items, sample), confidence(user, items, sample))


def test_the_surer_the_larger_the_margin_and_never_below_zero() -> None:
    sure = torch.tensor([[[-0.5, 0.0, 0.5]]])
    assert_close(per_negative_margin(sure, base=1.0, slope=0.3), torch.tensor([[[0.85, 1.0, 1.15]]]))
    assert_close(per_negative_margin(sure, base=1.0, slope=4.0), torch.tensor([[[0.0, 1.0, 3.0]]]))


def test_a_margin_shrinks_in_a_line_from_the_threshold_down_to_nothing() -> None:
    sure = torch.tensor([[[-0.5, -0.45, -0.4, -0.3, 0.0, 0.5]]], dtype=torch.float64)
    margin = torch.full_like(sure, 2.0)
    expected = torch.tensor([[[0.0, 0.5, 1.0, 2.0, 2.0, 2.0]]], dtype=torch.float64)
    assert_close(shrunk_margin(margin, sure, threshold=-0.3), expected)
    assert_close(shrunk_margin(margin, sure, threshold=-0.5), margin)  # nothing is below
    assert_close(shrunk_margin(margin, sure, threshold=0.5), 2.0 * (sure + 0.5))
    steps = torch.linspace(-0.5, 0.5, 10_001, dtype=torch.float64)[None, None]
    found = shrunk_margin(per_negative_margin(steps, base=1.0, slope=0.3), steps, threshold=-0.3)
    assert found.diff().abs().max() < 1e-3  # no jump at the threshold


def test_the_batch_margin_falls_as_negatives_are_liked_more() -> None:
    assert batch_margin(1.0, 1.0, base=2.0, slope=0.3) == pytest.approx(2.0)
    assert batch_margin(2.0, 1.0, base=2.0, slope=0.3) == pytest.approx(2.0 * 0.7)
    assert batch_margin(9.0, 1.0, base=2.0, slope=0.3) == 0.0
