"""A run whose ranking falls while its loss falls is called a collapse; others are not."""

from typing import Any

import pytest

from recray.train.collapse import collapse


def lines(values: list[float], losses: list[float]) -> list[dict[str, Any]]:
    """A validation before the first step and after every tenth; `losses` are those of the ten steps between."""
    found: list[dict[str, Any]] = [{"kind": "validation", "step": 0, "ndcg@10": values[0]}]
    for number, (value, loss) in enumerate(zip(values[1:], losses, strict=True)):
        found += [{"kind": "train", "step": 10 * number + step, "loss": loss} for step in range(1, 11)]
        found.append({"kind": "validation", "step": 10 * (number + 1), "ndcg@10": value})
    return found


def test_ranking_that_falls_while_the_loss_falls_is_a_collapse() -> None:
    found = collapse(lines([0.40, 0.45, 0.43, 0.41], [0.9, 0.6, 0.3]), "ndcg@10")
    assert found is not None
    assert found == pytest.approx((0.45, 10, 0.41, 0.9, 0.3))
    assert "fell from 0.4500 at step 10 to 0.4100, the loss from 0.9000 to 0.3000" in str(found)


def test_the_start_may_have_been_the_best() -> None:
    found = collapse(lines([0.45, 0.42, 0.40], [0.9, 0.6]), "ndcg@10")
    assert found is not None
    assert (found.best_step, found.loss_then, found.loss_now) == (0, pytest.approx(0.9), pytest.approx(0.6))


@pytest.mark.parametrize(
    ("values", "losses"),
    [
        ([0.40, 0.45, 0.46, 0.47], [0.9, 0.6, 0.3]),  # it learns
        ([0.40, 0.45, 0.44, 0.43], [0.9, 0.6, 0.3]),  # it falls by less than a twentieth
        ([0.40, 0.45, 0.41], [0.9, 0.6]),  # the best is but one validation ago
        ([0.40, 0.45, 0.43, 0.41], [0.9, 0.95, 0.9]),  # the loss does not fall: it diverges
        ([0.40], []),
        ([0.40, 0.45, 0.43, 0.41], [0.9, 0.6, float("nan")]),
    ],
)
def test_what_is_not_a_collapse(values: list[float], losses: list[float]) -> None:
    assert collapse(lines(values, losses), "ndcg@10") is None
