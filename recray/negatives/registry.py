"""Which samplers there are: one file each, and one line here (and one for its settings in `recray.config`)."""

import difflib
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from recray.negatives import (
    adaptive,
    adaptive_mixed,
    in_batch,
    inverse_popularity,
    mixed,
    nearest,
    popularity,
    same_category,
    self_play,
    top_k_stochastic,
    uniform,
)
from recray.negatives.draws import Drawn


class Sampler(NamedTuple):
    """A sampler, how likely each item is, and what both have to be told.

    `weights` are the sampler's own where it has one for each item, else those of what it falls back to.
    """

    draw: Callable[..., np.ndarray | Drawn]
    needs: tuple[str, ...]
    weights: Callable[..., np.ndarray]
    weights_need: tuple[str, ...]
    falls_back: bool = True  # where what it is for does not suffice


_ANY = (uniform.weights, ("num_items",))
_BY_WEIGHT = ("frequency", "exponent")
_BATCH = ("batches", "target_frequency")

SAMPLERS = {
    "uniform": Sampler(uniform.draw, ("num_items",), *_ANY, falls_back=False),
    "popularity": Sampler(popularity.draw, _BY_WEIGHT, popularity.weights, _BY_WEIGHT, falls_back=False),
    "inverse_popularity": Sampler(
        inverse_popularity.draw, _BY_WEIGHT, inverse_popularity.weights, _BY_WEIGHT, falls_back=False
    ),
    "in_batch": Sampler(in_batch.draw, _BATCH, in_batch.weights, ("target_frequency",)),
    "mixed": Sampler(mixed.draw, (*_BATCH, "uniform_share"), *_ANY),
    "adaptive": Sampler(adaptive.draw, (*_BATCH, "scores"), in_batch.weights, ("target_frequency",)),
    "adaptive_mixed": Sampler(adaptive_mixed.draw, ("batches", "scores", "candidates"), *_ANY),
    "same_category": Sampler(same_category.draw, ("targets", "genres"), *_ANY),
    "nearest": Sampler(nearest.draw, ("targets", "near"), *_ANY),
    "self_play": Sampler(self_play.draw, ("pools",), *_ANY),
    "top_k_stochastic": Sampler(top_k_stochastic.draw, ("pools", "top_k"), *_ANY),
}


class Prepared(NamedTuple):
    """A sampler that knows the catalogue: `draw` takes (rows, met_items, met_offsets, *, num, seed)."""

    draw: Callable[..., Drawn]
    weights: Callable[[], np.ndarray]


def needs_of(name: str) -> tuple[str, ...]:
    """Return what this sampler has to be told.

    Raises:
        ValueError: if there is no such sampler; names the nearest.
    """
    if name not in SAMPLERS:
        near = difflib.get_close_matches(name, SAMPLERS, n=1, cutoff=0.0)
        raise ValueError(f"no sampler {name!r}; the nearest is {near[0]!r}")
    sampler = SAMPLERS[name]
    return tuple(dict.fromkeys((*sampler.needs, *sampler.weights_need)))


def prepared(name: str, known: Mapping[str, Any]) -> Prepared:
    """Return the sampler of this name, told what it needs of what is known.

    Raises:
        ValueError: if there is no such sampler, or it needs what is not known.
    """
    missing = [need for need in needs_of(name) if need not in known]
    if missing:
        raise ValueError(f"sampler {name!r} needs {', '.join(missing)}; got {', '.join(known) or 'nothing'}")
    sampler = SAMPLERS[name]
    told = partial(sampler.draw, **{need: known[need] for need in sampler.needs})
    return Prepared(
        partial(_counted, told), partial(sampler.weights, **{need: known[need] for need in sampler.weights_need})
    )


def _counted(draw: Callable[..., np.ndarray | Drawn], *rows: Any, **settings: Any) -> Drawn:
    """Return what `draw` does; a sampler without a fallback finds all itself."""
    drawn = draw(*rows, **settings)
    return drawn if isinstance(drawn, Drawn) else Drawn(drawn, np.full(len(drawn), drawn.shape[1]))
