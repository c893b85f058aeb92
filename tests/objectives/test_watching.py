"""Where the gradient goes and how far the positive leads, by rank of the negative."""

import pytest
import torch

from recray.objectives.watching import WATCHED, watched


def found(policy: torch.Tensor, reward: torch.Tensor, gradient: torch.Tensor) -> dict[str, float]:
    return dict(zip(WATCHED, watched(policy, reward, gradient).tolist(), strict=True))


def test_shares_of_the_gradient_by_hand() -> None:
    # First user: negative 1 is level with the positive. Second: of -2 -3 -9 the highest cluster is -2 alone.
    policy = torch.tensor([[-2.0, -2.0, -3.0, -9.0], [-1.0, -9.0, -2.0, -3.0]]).double()
    gradient = torch.tensor([[-5.0, 3.0, 1.0, 0.0], [-9.0, -2.0, 1.0, 1.0]]).double()
    shares = found(policy, policy, gradient)
    assert shares["boundary_gradient"] == pytest.approx((3 + 1) / 8)
    assert shares["easy_gradient"] == pytest.approx((1 + 0 + 2 + 1) / 8)


def test_margins_by_rank_of_policy_score_by_hand() -> None:
    policy = torch.tensor([[-1.0, -6.0, -2.0, -4.0, -3.0, -5.0]]).double()
    reward = torch.tensor([[1.0, 0.5, 0.9, 0.2, 0.3, 0.1]]).double()
    by_rank = found(policy, reward, 0 * policy)
    names = ("margin_hardest", "margin_q25", "margin_q50", "margin_q75", "margin_easiest")
    # Ranked -2 -3 -4 -5 -6, whose rewards are .9 .3 .2 .1 .5.
    assert [by_rank[name] for name in names] == pytest.approx([0.1, 0.7, 0.8, 0.9, 0.5])


def test_margins_are_means_over_users_and_any_number_of_negatives_has_all_ranks() -> None:
    policy = torch.tensor([[-1.0, -2.0], [-1.0, -3.0]]).double()
    by_rank = found(policy, 2 * policy, policy)
    assert [by_rank[name] for name in WATCHED[2:]] == pytest.approx([3.0] * 5)


def test_without_a_gradient_nobody_gets_a_share() -> None:
    policy = torch.tensor([[-1.0, -2.0, -3.0]]).double()
    shares = found(policy, policy, 0 * policy)
    assert (shares["boundary_gradient"], shares["easy_gradient"]) == (0.0, 0.0)
