"""Which samplers there are: one file each, and one line here."""

import difflib
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from recray.negatives import popularity, uniform


class Sampler(NamedTuple):
    """A sampler, and what it has to be told about the catalogue."""

    draw: Callable[..., np.ndarray]
    weights: Callable[..., np.ndarray]
    needs: tuple[str, ...]


SAMPLERS = {
    "uniform": Sampler(uniform.draw, uniform.weights, ("num_items",)),
    "popularity": Sampler(popularity.draw, popularity.weights, ("frequency", "exponent")),
}


def prepared(name: str, **known: Any) -> Sampler:
    """Return the sampler of this name, told what it needs of what is known.

    Its `draw` then takes (rows, met_items, met_offsets, *, num, seed), its `weights` nothing.

    Raises:
        ValueError: if there is no such sampler, or it needs what is not known.
    """
    if name not in SAMPLERS:
        near = difflib.get_close_matches(name, SAMPLERS, n=1, cutoff=0.0)
        raise ValueError(f"no sampler {name!r}; the nearest is {near[0]!r}")
    sampler = SAMPLERS[name]
    missing = [need for need in sampler.needs if need not in known]
    if missing:
        raise ValueError(f"sampler {name!r} needs {', '.join(missing)}; got {', '.join(known) or 'nothing'}")
    told = {need: known[need] for need in sampler.needs}
    return Sampler(partial(sampler.draw, **told), partial(sampler.weights, **told), ())
