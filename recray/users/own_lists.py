"""Negatives that each target has of its own, by the model as it is now: those of a batch can't be shared.

Axes:
    T  targets of one rank
    Q  rows whose nearest items are asked for: targets
    I  items of the catalogue
    D  width of states and item vectors
    L  items of a target's window, its own among them
    P  negatives a target
    W  ranks of a window of ranks

What is random is settled by the step alone, as places in a list that each target has: the same on every rank. No
negative is an item of the target's window, met before or after; of what else its user met nothing is known here.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy import ndarray
from torch import Tensor

from recray.config import Users
from recray.errors import DataError
from recray.negatives.same_category import Genres

SAMPLERS = ("same_category", "nearest", "self_play", "top_k_stochastic")
SCORES_AT_ONCE = 1 << 20  # 4 MiB of float32


@dataclass(frozen=True)
class Lists:
    """Chooses a list of negatives for each target: [T, P], from states, item vectors, targets and what is barred."""

    choose: Callable[[Tensor, Tensor, Tensor, Tensor, np.random.Generator], Tensor]

    def of(
        self,
        states: Float[Tensor, "T D"],
        items: Float[Tensor, "I D"],
        targets: Int[Tensor, " T"],
        barred: Int[Tensor, "T L"],
        *,
        seed: int,
        step: int,
    ) -> tuple[Int[Tensor, "T P"], Bool[Tensor, "T P"]]:
        """Return the negatives of each target in a step, and which of them count.

        Args:
            states: [T, D] of the model, one a target.
            items: [I, D] its item vectors.
            targets: [T] the item that came next.
            barred: [T, L] what is no negative of a target: the items of its window, itself among them.
            seed: of the run.
            step: of the run.
        """
        with torch.no_grad():
            negatives = self.choose(states, items, targets, barred, np.random.default_rng([seed, step]))
            return negatives, ~(negatives[:, :, None] == barred[:, None, :]).any(dim=2)


def lists_of(settings: Users, num_items: int, genres: Genres | None) -> Lists:
    """Return what the sampler of these settings lists.

        self_play         the `hardest` items of the highest score after the target's history
        top_k_stochastic  `listed` random ranks of the `top_k` of the highest score
        nearest           `listed` random ranks of nearest_from .. nearest_to, by cosine with the target's vector
        same_category     `listed` random items that share a genre with the target, with replacement; any items where it
                          has none

    Raises:
        DataError: if the catalogue has no item of these ranks, or there are no genres.
        ValueError: if the sampler makes no such lists.

    Reference: self-play after Gao et al., https://arxiv.org/abs/2412.09243; random ones of the best K after RoDPO,
    https://arxiv.org/abs/2603.29259.
    """
    sampler = settings.sampler
    if sampler == "same_category":
        if genres is None or not genres.sets:
            raise DataError(
                "users.sampler is same_category, but no item of the catalogue has genres; name their column in "
                "ingest.columns.genres, or choose another sampler"
            )
        return Lists(_OfTheGenre.of(genres, settings.listed))
    if sampler == "nearest":
        return Lists(_near(_ranks(settings.nearest_from, settings.nearest_to, num_items), settings.listed))
    if sampler == "top_k_stochastic":
        return Lists(_best(_ranks(1, settings.top_k, num_items), settings.listed))
    if sampler == "self_play":
        ranks = _ranks(1, settings.hardest, num_items)
        return Lists(_best(ranks, len(ranks)))
    raise ValueError(f"{sampler} has no lists of a target's own; those that have: {', '.join(SAMPLERS)}")


def ranked(
    queries: Float[Tensor, "Q D"], items: Float[Tensor, "I D"], barred: Int[Tensor, "Q L"], ranks: range
) -> Int[Tensor, "Q W"]:
    """Return for each query the items at these ranks of the dot product, highest first; barred ones come last.

    Rank 1 is the highest. Memory is that of one chunk of queries: Q * I scores are never held.
    """
    chunk = max(1, SCORES_AT_ONCE // len(items))
    found = []
    for first in range(0, len(queries), chunk):
        scores = queries[first : first + chunk] @ items.T
        scores.scatter_(1, barred[first : first + chunk], -torch.inf)
        found.append(scores.topk(ranks.stop - 1, dim=1).indices[:, ranks.start - 1 :])
    return torch.cat(found)


def _ranks(first: int, last: int, num_items: int) -> range:
    """Return the ranks from first to last that the catalogue has, the target left out."""
    found = range(first, min(last, num_items - 1) + 1)
    if not found:
        raise DataError(f"users.sampler draws from ranks {first} to {last}, but there are {num_items} items")
    return found


def _best(ranks: range, number: int) -> Callable[..., Tensor]:
    def choose(
        states: Tensor, items: Tensor, targets: Tensor, barred: Tensor, generator: np.random.Generator
    ) -> Tensor:
        del targets
        return ranked(states, items, barred, ranks)[:, _places(len(ranks), number, generator)]

    return choose


def _near(ranks: range, number: int) -> Callable[..., Tensor]:
    def choose(
        states: Tensor, items: Tensor, targets: Tensor, barred: Tensor, generator: np.random.Generator
    ) -> Tensor:
        # Ranks are those of nearness to the target: what else the window holds is masked, and moves no other up.
        del states, barred
        units = torch.nn.functional.normalize(items, dim=1)
        asked, of = torch.unique(targets, return_inverse=True)
        near = ranked(units[asked], units, asked[:, None], ranks)
        return near[of][:, _places(len(ranks), number, generator)]

    return choose


@dataclass(frozen=True)
class _OfTheGenre:
    """Random items of those that share a genre with a target."""

    set_of_item: Int[ndarray, " I"]  # the last set, of all items, where an item has no genre
    items: Int[ndarray, " entries"]  # of every set, end to end
    offsets: Int[ndarray, " offsets"]
    number: int

    @classmethod
    def of(cls, genres: Genres, number: int) -> "_OfTheGenre":
        num_items = len(genres.set_of_item)
        lists = [*(genres.sharing(which) for which in range(len(genres.sets))), np.arange(num_items)]
        offsets = np.cumsum([0, *(len(each) for each in lists)])
        sets = np.where(genres.set_of_item < 0, len(genres.sets), genres.set_of_item)
        return cls(sets, np.concatenate(lists), offsets, number)

    def __call__(
        self, states: Tensor, items: Tensor, targets: Tensor, barred: Tensor, generator: np.random.Generator
    ) -> Tensor:
        """Return [T, P]: places of a list that are the same for all targets, in the list of each."""
        del states, items, barred
        places = generator.random(self.number)
        sets = self.set_of_item[targets.cpu().numpy()]
        first, length = self.offsets[sets], np.diff(self.offsets)[sets]
        found = self.items[first[:, None] + (places * length[:, None]).astype(np.int64)]
        return torch.from_numpy(found).to(targets.device)


def _places(width: int, number: int, generator: np.random.Generator) -> Int[Tensor, " P"]:
    """Return that many different places of a list, all alike; all of a shorter one."""
    return torch.from_numpy(np.sort(generator.permutation(width)[:number]))
