"""The negatives of a sampled softmax: which items a batch's targets are compared with, and how often each is expected.

Axes:
    I  items of the catalogue
    T  targets of the global batch
    S  sampled negatives, shared by the batch

What a sample is drawn from depends on the step alone, never on the rank: all ranks compare with the same items.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray

IN_BATCH = ("in_batch", "adaptive")
MIXED = ("mixed", "adaptive_mixed")
HARDEST = ("adaptive", "adaptive_mixed")  # of the sample, a target is compared with those of the highest scores


@dataclass(frozen=True)
class Proposal:
    """How negatives are drawn: each place of the sample by `chance`, or from the batch, or uniform."""

    chance: Float[ndarray, " I"]  # the share of the sample that each item is to be expected to have; sums to 1
    number: int  # S
    from_batch: int  # the last places of the sample, filled with targets of the batch

    def drawn(
        self, batch: Int[ndarray, " T"], *, seed: int, step: int
    ) -> tuple[Int[ndarray, " S"], Float[ndarray, " S"]]:
        """Return the negatives of a step, with replacement, and the log of how often each was to be expected.

        Args:
            batch: all targets of the global batch; read by samplers from the batch only.
            seed: of the run.
            step: of the run.
        """
        places = np.random.default_rng([seed, step]).random(self.number)
        if self.from_batch == 0:
            cumulative = np.cumsum(self.chance)
            found = np.searchsorted(cumulative, places * cumulative[-1], side="right")
        else:
            border = self.number - self.from_batch
            uniform = (places[:border] * len(self.chance)).astype(np.int64)
            found = np.concatenate([uniform, batch[(places[border:] * len(batch)).astype(np.int64)]])
        return found, np.log(self.number * self.chance[found]).astype(np.float32)


def proposal(
    sampler: str, counts: Int[ndarray, " I"], number: int, *, exponent: float = 1.0, uniform_share: float = 0.5
) -> Proposal:
    """Return what this sampler draws `number` negatives from.

        uniform             1
        popularity          (count + 1) ** exponent: plus 1, so that every item may be drawn
        inverse_popularity  (count + 1) ** -exponent
        in_batch            the targets of the batch: over all batches, count
        mixed               round(uniform_share * S) places uniform, the others in-batch

    up to a factor. `adaptive` and `adaptive_mixed` draw as `in_batch` and `mixed`. The chance of an in-batch negative
    is that over all batches, not in this one: it is what the sample stands for.

    Args:
        sampler: one of these names.
        counts: [I] how often each item is a target in a pass.
        number: S.
        exponent: for popularity and inverse_popularity.
        uniform_share: for mixed and adaptive_mixed.

    Raises:
        ValueError: if there is no such sampler.

    Reference: Yi et al., "Sampling-Bias-Corrected Neural Modeling for Large Corpus Item Recommendations", RecSys 2019,
    and Yang et al., "Mixed Negative Sampling for Learning Two-tower Neural Networks in Recommendations", WWW 2020.
    """
    from_batch = {**dict.fromkeys(IN_BATCH, number), **dict.fromkeys(MIXED, number - round(uniform_share * number))}
    taken = from_batch.get(sampler, 0)
    if sampler in from_batch:
        uniform = (number - taken) / number
        return Proposal(uniform / len(counts) + (1 - uniform) * counts / counts.sum(), number, taken)
    powers = {"uniform": 0.0, "popularity": exponent, "inverse_popularity": -exponent}
    if sampler not in powers:
        raise ValueError(f"no sampler {sampler!r} for SASRec; there are: {', '.join([*powers, *from_batch])}")
    weights = (counts + 1.0) ** powers[sampler]
    return Proposal(weights / weights.sum(), number, 0)
