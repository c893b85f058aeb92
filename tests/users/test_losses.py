"""The softmax losses against their plain formulas."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from recray.users.losses import full_softmax, hardest_softmax, sampled_softmax


def _problem(tokens: int = 13, items: int = 29, dim: int = 5, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(tokens, dim, generator=generator, dtype=torch.float64) * scale
    table = torch.randn(items, dim, generator=generator, dtype=torch.float64)
    targets = torch.randint(0, items, (tokens,), generator=generator)
    return states.requires_grad_(), table.requires_grad_(), targets


def test_full_softmax_by_hand() -> None:
    states, table = torch.tensor([[1.0], [0.0]]), torch.tensor([[math.log(3.0)], [0.0]])
    loss = full_softmax(states, table, torch.tensor([0, 1]))
    assert loss.item() == pytest.approx(math.log(4 / 3) + math.log(2))


@pytest.mark.parametrize("logits_at_once", [1, 29, 29 * 5, 29 * 13, 1 << 20])
def test_full_softmax_is_cross_entropy_however_it_is_cut(logits_at_once: int) -> None:
    states, table, targets = _problem()
    targets[3] = targets[4] = targets[5]  # one item as several tokens' target
    plain = cross_entropy(states @ table.T, targets, reduction="sum")
    chunked = full_softmax(states, table, targets, logits_at_once=logits_at_once)
    torch.testing.assert_close(chunked, plain)
    wanted = torch.autograd.grad(plain * 0.3, (states, table))
    found = torch.autograd.grad(chunked * 0.3, (states, table))
    torch.testing.assert_close(found, wanted)


def test_full_softmax_has_the_gradient_of_finite_differences() -> None:
    states, table, targets = _problem(tokens=3, items=4, dim=2)
    assert torch.autograd.gradcheck(lambda s, t: full_softmax(s, t, targets, logits_at_once=8), (states, table))


def test_full_softmax_holds_at_extremes() -> None:
    states, table, targets = _problem(scale=1e4)
    loss = full_softmax(states, table, targets)
    torch.testing.assert_close(loss, cross_entropy(states @ table.T, targets, reduction="sum"))
    loss.backward()  # type: ignore[no-untyped-call]
    assert states.grad is not None
    assert torch.isfinite(states.grad).all()


def test_full_softmax_without_gradients() -> None:
    states, table, targets = _problem()
    with torch.no_grad():
        loss = full_softmax(states, table, targets)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, cross_entropy(states @ table.T, targets, reduction="sum").detach())


def test_sampled_softmax_in_plain_loops() -> None:
    states, table, targets = _problem()
    negatives, expected = torch.tensor([0, 4, 4, 9, 28]), torch.linspace(0.2, 0.9, 5, dtype=torch.float64)
    targets[2] = 4
    total = 0.0
    for state, target in zip(states.tolist(), targets.tolist(), strict=True):
        scores = [math.exp(sum(a * b for a, b in zip(state, row, strict=True))) for row in table.tolist()]
        others = [
            scores[item] / often
            for item, often in zip(negatives.tolist(), expected.tolist(), strict=True)
            if item != target
        ]
        total -= math.log(scores[target] / (scores[target] + sum(others)))
    loss = sampled_softmax(states, table, targets, negatives, expected.log())
    assert loss.item() == pytest.approx(total)


def test_sampling_every_item_once_is_the_full_softmax() -> None:
    states, table, targets = _problem()
    every = torch.arange(len(table))
    sampled = sampled_softmax(states, table, targets, every, torch.zeros(len(table), dtype=torch.float64))
    full = full_softmax(states, table, targets)
    torch.testing.assert_close(sampled, full)
    torch.testing.assert_close(
        torch.autograd.grad(sampled, (states, table)), torch.autograd.grad(full, (states, table))
    )


def test_the_correction_makes_the_sum_over_the_sample_unbiased() -> None:
    # exp(loss) = sum / exp(positive), so its mean over many samples is that of the full softmax.
    states, table, targets = _problem(tokens=1, items=6, dim=2, scale=0.5)
    chance = np.array([0.4, 0.3, 0.1, 0.1, 0.05, 0.05])
    rng = np.random.default_rng(0)
    found = []
    for _ in range(4000):
        drawn = rng.choice(6, size=4, p=chance)
        expected = torch.from_numpy(np.log(4 * chance[drawn]))
        found.append(sampled_softmax(states, table, targets, torch.from_numpy(drawn), expected).exp().item())
    wanted = full_softmax(states, table, targets).exp().item()
    assert np.mean(found) == pytest.approx(wanted, abs=4 * np.std(found) / math.sqrt(len(found)))


def test_hardest_softmax_in_plain_loops() -> None:
    states, table, targets = _problem()
    negatives = torch.tensor([0, 4, 9, 20, 28])
    targets[2] = 4
    total = 0.0
    for state, target in zip(states.tolist(), targets.tolist(), strict=True):
        scores = [math.exp(sum(a * b for a, b in zip(state, row, strict=True))) for row in table.tolist()]
        others = sorted((scores[item] for item in negatives.tolist() if item != target), reverse=True)[:2]
        total -= math.log(scores[target] / (scores[target] + sum(others)))
    assert hardest_softmax(states, table, targets, negatives, 2).item() == pytest.approx(total)


def test_the_hardest_of_all_items_are_the_full_softmax() -> None:
    states, table, targets = _problem()
    hardest = hardest_softmax(states, table, targets, torch.arange(len(table)), 10 * len(table))
    full = full_softmax(states, table, targets)
    torch.testing.assert_close(hardest, full)
    torch.testing.assert_close(
        torch.autograd.grad(hardest, (states, table)), torch.autograd.grad(full, (states, table))
    )


def test_only_the_hardest_learn_anything() -> None:
    states, table, targets = _problem(tokens=1)
    negatives = torch.tensor([item for item in range(0, len(table), 3) if item != int(targets[0])])
    (grad,) = torch.autograd.grad(hardest_softmax(states, table, targets, negatives, 2), table)
    touched = set(grad.abs().sum(dim=1).nonzero()[:, 0].tolist())
    scores = (table[negatives] @ states[0]).tolist()
    wanted = [item for _, item in sorted(zip(scores, negatives.tolist(), strict=True))[-2:]]
    assert touched == {int(targets[0]), *wanted}
