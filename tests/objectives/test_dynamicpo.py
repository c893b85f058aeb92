"""DynamicPO's parts: which negatives are at the boundary, exactly, what beta each has, and where the release breaks."""

import math
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from recray.config import Objective, Pipeline, override
from recray.errors import ConfigError
from recray.objectives.dmpo import dmpo_loss
from recray.objectives.dynamicpo import boundary_negatives, dual_margin_beta, dynamicpo_loss, hardest_cluster


def row(*values: float) -> Tensor:
    return torch.tensor([values], dtype=torch.float64)


def every(score: Tensor) -> Tensor:
    return torch.ones_like(score, dtype=torch.bool)


def members(mask: Tensor) -> list[int]:
    return mask[0].nonzero()[:, 0].tolist()


def squares(values: list[float]) -> float:
    return sum((each - sum(values) / len(values)) ** 2 for each in values)


def best_partitions(values: list[float]) -> tuple[float, list[set[int]]]:
    """The least squared distance of three clusters that are none empty, over all 3^N ways, and their highest ones."""
    found: dict[frozenset[int], float] = {}
    for labels in product(range(3), repeat=len(values)):
        if set(labels) != {0, 1, 2}:
            continue
        parts = [[n for n, label in enumerate(labels) if label == k] for k in range(3)]
        cost = sum(squares([values[n] for n in part]) for part in parts)
        top = max(parts, key=lambda part: sum(values[n] for n in part) / len(part))
        found[frozenset(top)] = min(cost, found.get(frozenset(top), math.inf))
    least = min(found.values())
    return least, [set(top) for top, cost in found.items() if cost <= least + 1e-9]


# -- the boundary ----------------------------------------------------------------------------


def test_negatives_at_least_as_high_as_the_positive_are_the_boundary() -> None:
    score = row(-1.0, -3.0, -2.0, -2.5)
    assert members(boundary_negatives(torch.tensor([-2.0]).double(), score, every(score))) == [0, 2]


def test_else_it_is_the_highest_of_three_clusters() -> None:
    score = row(-9.0, -5.0, -5.2, -20.0, -9.1, -5.1)
    assert members(boundary_negatives(torch.zeros(1).double(), score, every(score))) == [1, 2, 5]


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("negatives", [3, 4, 7])
def test_the_clusters_are_the_best_of_all_ways_to_cluster(negatives: int, seed: int) -> None:
    score = torch.randn(1, negatives, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    _, tops = best_partitions(score[0].tolist())
    assert set(members(hardest_cluster(score, every(score)))) in tops


@pytest.mark.parametrize("seed", range(12))
def test_with_ties_too_and_equal_scores_stay_together(seed: int) -> None:
    score = torch.randint(5, (1, 7), generator=torch.Generator().manual_seed(seed)).double()
    top = set(members(hardest_cluster(score, every(score))))
    for value in set(score[0].tolist()):
        alike = {n for n, each in enumerate(score[0].tolist()) if each == value}
        assert alike <= top or not alike & top
    if len(score.unique()) >= 3:
        assert top in best_partitions(score[0].tolist())[1]


def test_of_two_ways_as_good_the_smaller_highest_cluster_counts() -> None:
    # 3 2 1 0: one pair and two alone, whichever pair.
    score = row(3.0, 2.0, 1.0, 0.0)
    assert members(hardest_cluster(score, every(score))) == [0]


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ((-4.0,), [0]),
        ((-4.0, -3.0), [1]),
        ((-3.0, -3.0), [0, 1]),
        ((-3.0, -3.0, -3.0, -3.0), [0, 1, 2, 3]),
        ((-3.0, -5.0, -3.0, -5.0), [0, 2]),
    ],
)
def test_fewer_than_three_different_scores_are_a_cluster_each(scores: tuple[float, ...], expected: list[int]) -> None:
    score = row(*scores)
    assert members(hardest_cluster(score, every(score))) == expected


def test_what_is_not_usable_is_no_ones_neighbour() -> None:
    score = row(-1.0, torch.nan, -1.1, 5.0, -7.0, -20.0)
    usable = torch.tensor([[True, False, True, False, True, True]])
    assert members(hardest_cluster(score, usable)) == [0, 2]
    assert members(boundary_negatives(torch.zeros(1).double(), score, usable)) == [0, 2]
    assert members(hardest_cluster(score, torch.zeros_like(usable))) == []


def test_scores_far_from_zero_are_clustered_as_well() -> None:
    score = row(-9.0, -5.0, -5.2, -20.0, -9.1, -5.1)
    near = hardest_cluster(score * 1e-4, every(score))
    far = hardest_cluster(score * 1e-4 - 1e4, every(score))
    assert members(near) == members(far) == [1, 2, 5]


# -- beta --------------------------------------------------------------------------------------


def test_beta_by_hand() -> None:
    # Boundary 0 and 1, easy 2 and 3 with mean -6. For 0: m1 = -1, m2 = 5: (-1 - 5 - 2) / 6. For 1: m1 = 0, m2 = 4.
    score = row(-1.0, -2.0, -5.0, -7.0)
    boundary = torch.tensor([[True, True, False, False]])
    beta = dual_margin_beta(torch.tensor([-2.0]).double(), score, boundary, every(score), beta=2.0)
    assert_close(beta[0, 0].item(), 2 * (1 + 0.5 * math.tanh(-8 / 6)))
    assert_close(beta[0, 1].item(), 2 * (1 + 0.5 * math.tanh(-6 / 4)))


def test_where_all_are_on_the_boundary_they_are_their_own_easy_ones() -> None:
    score = row(-1.0, -3.0)
    beta = dual_margin_beta(torch.tensor([-4.0]).double(), score, every(score), every(score), beta=1.0)
    # For 0: m1 = -3, m2 = -1 + 2 = 1. For 1: m1 = -1, m2 = -1.
    assert_close(beta[0, 0].item(), 1 + 0.5 * math.tanh((-3 - 1 - 2) / 4))
    assert_close(beta[0, 1].item(), 1 + 0.5 * math.tanh((-1 + 1 - 2) / 2))


def test_beta_stays_between_half_and_one_and_a_half_times() -> None:
    rng = torch.Generator().manual_seed(0)
    positive, score = 1e4 * torch.randn(50, generator=rng), 1e4 * torch.randn(50, 6, generator=rng)
    boundary = boundary_negatives(positive, score, every(score))
    beta = dual_margin_beta(positive, score, boundary, every(score), beta=2.0)
    assert beta.isfinite().all()
    assert beta.min() >= 1.0
    assert beta.max() <= 3.0


def test_no_gradient_goes_through_beta_or_the_choice_of_negatives() -> None:
    rng = torch.Generator().manual_seed(0)
    positive = torch.randn(3, generator=rng, dtype=torch.float64).requires_grad_()
    negative = torch.randn(3, 6, generator=rng, dtype=torch.float64).requires_grad_()
    usable = every(negative)
    boundary = boundary_negatives(positive, negative, usable)
    beta = dual_margin_beta(positive, negative, boundary, usable, beta=1.0).clone()
    found = torch.autograd.grad(
        dynamicpo_loss(positive, negative, positive, negative, usable, beta=1.0).sum(), negative
    )
    frozen = torch.autograd.grad(dmpo_loss(positive, negative, boundary, beta=beta).sum(), negative)
    assert_close(found[0], frozen[0], rtol=0, atol=0)
    assert (found[0][~boundary] == 0).all()
    assert (found[0][boundary] > 0).all()
    torch.autograd.gradcheck(lambda p, n: dmpo_loss(p, n, boundary, beta=beta), (positive, negative))


# -- what the release does -----------------------------------------------------------------------


def released_beta(positive: float, score: float, easy: list[float], beta: float) -> float:
    """One negative at a time, on Python's numbers."""
    m1, m2 = positive - score, score - sum(easy) / len(easy)
    return beta * (1 + 0.5 * math.tanh((m1 - m2 - 2) / (abs(m1) + abs(m2))))


def test_a_zero_denominator_ends_the_release_and_is_the_limit_here() -> None:
    # All scores alike, as where a model has learnt nothing: both margins are 0.
    with pytest.raises(ZeroDivisionError):
        released_beta(-3.0, -3.0, [-3.0], 2.0)
    score = row(-3.0, -3.0)
    level = torch.tensor([-3.0]).double()
    assert dual_margin_beta(level, score, every(score), every(score), beta=2.0).tolist() == [[1.0, 1.0]]
    near = released_beta(-3.0, -3.0 + 1e-7, [-3.0], 2.0)
    assert near == pytest.approx(1.0)
    leaf = score.clone().requires_grad_()
    with torch.autograd.set_detect_anomaly(True):
        dynamicpo_loss(level, leaf, level, leaf, every(score), beta=2.0).sum().backward()
    assert leaf.grad is not None
    assert leaf.grad.isfinite().all()


def lloyd(values: list[float], centres: list[float]) -> set[int]:
    """k-means as commonly run, from given centres; the members of its highest cluster."""
    for _ in range(50):
        nearest = [min(range(len(centres)), key=lambda k: abs(value - centres[k])) for value in values]
        groups = [[v for v, k in zip(values, nearest, strict=True) if k == c] for c in range(len(centres))]
        centres = [sum(group) / len(group) if group else old for group, old in zip(groups, centres, strict=True)]
    top = max(range(len(centres)), key=lambda k: centres[k])
    return {n for n, k in enumerate(nearest) if k == top}


def test_clusters_from_a_random_start_depend_on_it_and_ours_are_the_best() -> None:
    values = [-1.0, -1.2, -4.0, -4.1, -9.0, -9.3]
    starts = [[-1.0, -4.0, -9.0], [-2.0, -9.0, -9.3]]
    assert lloyd(values, starts[0]) != lloyd(values, starts[1])
    score = row(*values)
    assert set(members(hardest_cluster(score, every(score)))) == lloyd(values, starts[0]) == {0, 1}


def test_ties_part_equal_negatives_where_sorting_decides_and_not_here() -> None:
    # Cut by place in the sorted list, the two at -1 may fall apart; which of them, by their order.
    score = row(-1.0, -1.0, -8.0, -8.0, -8.0)
    by_place = score[0].argsort(descending=True, stable=True)[:1].tolist()
    assert by_place == [0]
    assert members(hardest_cluster(score, every(score))) == [0, 1]
    order = torch.tensor([4, 1, 3, 0, 2])
    assert members(hardest_cluster(score[:, order], every(score))) == [1, 3]


@pytest.mark.parametrize("negatives", [1, 2])
def test_fewer_than_three_negatives_are_no_error(negatives: int) -> None:
    # Three clusters of fewer samples is what scikit-learn refuses.
    positive, score = torch.zeros(2, dtype=torch.float64), -torch.arange(1.0, 1 + 2 * negatives).view(2, -1).double()
    loss = dynamicpo_loss(positive, score, positive, score, every(score), beta=1.0)
    assert loss.isfinite().all()
    assert (boundary_negatives(positive, score, every(score)).sum(dim=1) == 1).all()


def released_choice(mode: str, losses: dict[str, float]) -> float | None:
    """A chain of `if "..." in mode`, as released: what it does not know falls through."""
    for name, loss in losses.items():
        if name in mode:
            return loss
    return None


def test_an_unknown_mode_is_refused_with_the_nearest() -> None:
    losses = {"hard_negative": 1.0, "dynamic_beta": 2.0}
    assert released_choice("DMPO_hrad_negative", losses) is None
    assert released_choice("DMPO_no_dynamic_beta", losses) == 2.0
    pipeline = Pipeline(name="t")
    with pytest.raises(ConfigError, match=r"align\.objective\.name: no such objective; the nearest is 'dynamicpo'"):
        override(pipeline, settings=["align.objective.name=dynamic_po"])
    with pytest.raises(ConfigError, match=r"align\.objective\.boundry: unknown setting.*align\.objective\.boundary"):
        override(pipeline, settings=["align.objective.name=dmpo", "align.objective.boundry=true"])
    with pytest.raises(ConfigError, match=r"align\.objective\.boundary: .*got 'hard'"):
        override(pipeline, settings=["align.objective.name=dmpo", "align.objective.boundary=hard"])


def test_dynamicpo_is_dmpo_with_both_parts() -> None:
    chosen = Objective(name="dmpo", boundary=True, dual_margin=True)
    assert {"boundary": True, "dual_margin": True}.items() <= chosen.settings.items()
    from recray.objectives.family import ScoreBatch, losses

    rng = torch.Generator().manual_seed(0)
    score, policy = (-3 * torch.rand(4, 8, generator=rng, dtype=torch.float64) for _ in range(2))
    usable, nothing = torch.rand(4, 7, generator=rng) < 0.8, torch.zeros(4, 7)
    batch = ScoreBatch(score, policy, torch.arange(4), usable, nothing, nothing[:, 0])
    whole = losses(batch, "dynamicpo", Objective(name="dynamicpo").settings)
    assert_close(losses(batch, "dmpo", chosen.settings), whole, rtol=0, atol=0)
    assert not torch.allclose(losses(batch, "dmpo", Objective(name="dmpo").settings), whole)


class Counted(TorchDispatchMode):
    """How many operations are called."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += 1
        return func(*args, **(kwargs or {}))


def test_there_is_no_loop_over_users_and_nothing_waits_for_a_number() -> None:
    calls = []
    for users in (2, 64):
        score = torch.randn(users, 9, generator=torch.Generator().manual_seed(0))
        with Counted() as mode:
            dynamicpo_loss(score[:, 0], score[:, 1:], score[:, 0], score[:, 1:], every(score[:, 1:]), beta=1.0)
        calls.append(mode.calls)
    assert calls[0] == calls[1]
    # On "meta" there are no numbers to ask for: `.item()` or a branch on a value would raise.
    nowhere = torch.empty(3, 9, device="meta")
    loss = dynamicpo_loss(nowhere[:, 0], nowhere[:, 1:], nowhere[:, 0], nowhere[:, 1:], every(nowhere[:, 1:]), beta=1.0)
    assert loss.shape == (3,)
