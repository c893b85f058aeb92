"""A unit: everything one rank needs for one step, tokenised and laid out, as one block of bytes.

Units are made on data nodes and eaten by trainers. They are safetensors, so reading one runs no code.
"""

import json
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int
from numpy import ndarray
from safetensors.numpy import load, save

from recray.lm.layout import ARRAYS, Layout


class MicroBatch(NamedTuple):
    """Rows that one rank passes through the model together."""

    places: Int[ndarray, " b"]  # of its rows in the global batch; empty where the rank only keeps the others company
    layout: Layout


class Unit(NamedTuple):
    """The share of one rank in one step."""

    step: int
    rank: int
    micro_batches: list[MicroBatch]
    arrays: dict[str, ndarray]  # what the objective needs beside scores
    rows: list[int]  # row ids of the whole global batch, in its order


def pack_unit(unit: Unit) -> bytes:
    """Return the unit as safetensors."""
    tensors = {f"array.{name}": array for name, array in unit.arrays.items()}
    for number, micro in enumerate(unit.micro_batches):
        tensors[f"{number}.places"] = micro.places
        tensors |= {f"{number}.{name}": getattr(micro.layout, name) for name in ARRAYS}
    head = {
        "step": unit.step,
        "rank": unit.rank,
        "rows": unit.rows,
        "layouts": [[micro.layout.num_scores, micro.layout.plain] for micro in unit.micro_batches],
    }
    contiguous = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
    data: bytes = save(contiguous, metadata={"unit": json.dumps(head)})
    return data


def unpack_unit(data: bytes) -> Unit:
    """Return the unit that `pack_unit` wrote."""
    size = int.from_bytes(data[:8], "little")
    head = json.loads(json.loads(data[8 : 8 + size])["__metadata__"]["unit"])
    tensors = load(data)
    micro_batches = [
        MicroBatch(
            tensors[f"{number}.places"],
            Layout(**{name: tensors[f"{number}.{name}"] for name in ARRAYS}, num_scores=num_scores, plain=plain),
        )
        for number, (num_scores, plain) in enumerate(head["layouts"])
    ]
    arrays = {name.removeprefix("array."): value for name, value in tensors.items() if name.startswith("array.")}
    return Unit(head["step"], head["rank"], micro_batches, arrays, head["rows"])


def split(
    lengths: Int[ndarray, " G"], world_size: int, token_budget: int, *, least: int = 1
) -> list[list[Int[ndarray, " b"]]]:
    """Return [rank][micro-batch] places of the global batch.

    Rows go to ranks by falling length, each to the rank with the fewest tokens so far; inside a rank, neighbours in
    length share a micro-batch of at most `token_budget` padded tokens (one row at least). Every rank gets equally many
    micro-batches, empty ones where it has fewer: a rank that skipped a pass would leave the others waiting in ZeRO-3.

    Args:
        lengths: [G] tokens of each row.
        world_size: Ranks.
        token_budget: Most tokens of a micro-batch, padding included.
        least: Least micro-batches a rank.
    """
    ranks: list[list[int]] = [[] for _ in range(world_size)]
    tokens = np.zeros(world_size, dtype=np.int64)
    for place in np.argsort(-lengths, kind="stable").tolist():
        rank = int(tokens.argmin())
        ranks[rank].append(place)
        tokens[rank] += lengths[place]
    cut = [_cut(places, lengths, token_budget, least) for places in ranks]
    count = max(len(micro) for micro in cut)
    empty = np.zeros(0, dtype=np.int64)
    return [micro + [empty] * (count - len(micro)) for micro in cut]


def _cut(places: Sequence[int], lengths: Int[ndarray, " G"], budget: int, least: int) -> list[Int[ndarray, " b"]]:
    most = max(1, -(-len(places) // least))
    groups: list[list[int]] = []
    for place in places:  # by falling length, so the first of a group is its widest
        group = groups[-1] if groups else []
        if not group or len(group) >= most or int(lengths[group[0]]) * (len(group) + 1) > budget:
            groups.append([])
        groups[-1].append(place)
    return [np.array(group, dtype=np.int64) for group in groups]
