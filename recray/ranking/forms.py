"""Which number made from an item's log-probability ranks it.

The sum over an item's tokens is its log-probability, and favours short titles and items met often. The mean over the
tokens, and the sum less a share of what the model says without any history (pointwise mutual information where the
share is 1), answer one of these each. Which is better depends on catalogue and model, so it is chosen on validation.

Axes: C candidates of a row.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray

from recray.ranking.metrics import ndcg


class Form(NamedTuple):
    """A way to rank by log-probability."""

    name: str  # summed, mean or prior_corrected
    weight: float = 0.0  # of the prior, for prior_corrected

    @property
    def needs_prior(self) -> bool:
        """Whether it looks at the log-probability without a history."""
        return self.name == "prior_corrected"

    def __str__(self) -> str:
        """Return how reports write it."""
        return f"prior_corrected {self.weight:g}" if self.needs_prior else self.name

    def __call__(
        self,
        summed: Float[ndarray, " C"],
        tokens: Int[ndarray, " C"],
        prior: Float[ndarray, " C"] | None,
    ) -> Float[ndarray, " C"]:
        """Return the scores of one row's candidates.

        Args:
            summed: [C] log pi(item | prompt), nats, summed over the item's tokens.
            tokens: [C] tokens of each item, its end token counted.
            prior: [C] log pi(item | prompt of an empty history), nats; None where `needs_prior` is False.
        """
        if self.name == "mean":
            return np.asarray(summed / tokens)
        if prior is None or not self.needs_prior:
            return summed
        return np.asarray(summed - self.weight * prior)


SUMMED = Form("summed")


def forms_of(score: str, prior_weights: Sequence[float]) -> list[Form]:
    """Return the forms that `evaluate.score` leaves to choose from, the plainest first.

    >>> [str(form) for form in forms_of("validation", [0.5])]
    ['summed', 'mean', 'prior_corrected 0.5']
    """
    corrected = [Form("prior_corrected", weight) for weight in prior_weights]
    every = {"summed": [SUMMED], "mean": [Form("mean")], "prior_corrected": corrected}
    return [form for forms in every.values() for form in forms] if score == "validation" else every[score]


def best_form(forms: Sequence[Form], rank: Int[ndarray, "R F"], k: int) -> tuple[Form, dict[str, float]]:
    """Return the form with the best mean NDCG@k, of equals the first, and that of each.

    Args:
        rank: of the target of each validation row, by each form.
    """
    found = ndcg(rank, k).mean(axis=0)
    return forms[int(found.argmax())], {str(form): float(value) for form, value in zip(forms, found, strict=True)}
