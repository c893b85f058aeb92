"""Units: nothing is lost on the way, and a global batch is cut into equally many passes a rank."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from recray.lm.layout import stream_layout
from recray.train.units import MicroBatch, Unit, pack_unit, split, unpack_unit


def test_a_unit_survives_its_bytes() -> None:
    layout = stream_layout(np.arange(7), np.array([3, 4]))
    empty = MicroBatch(np.zeros(0, dtype=np.int64), stream_layout(np.array([1, 1]), np.array([2])))
    unit = Unit(
        step=3,
        rank=1,
        micro_batches=[MicroBatch(np.array([4, 0]), layout), empty],
        arrays={"usable": np.array([[True, False]]), "confidence": np.array([0.5], dtype=np.float32)},
        rows=[9, 4, 9],
    )
    back = unpack_unit(pack_unit(unit))
    assert (back.step, back.rank, back.rows) == (3, 1, [9, 4, 9])
    assert back.arrays.keys() == unit.arrays.keys()
    for name, array in unit.arrays.items():
        np.testing.assert_array_equal(back.arrays[name], array)
        assert back.arrays[name].dtype == array.dtype
    for micro, expected in zip(back.micro_batches, unit.micro_batches, strict=True):
        np.testing.assert_array_equal(micro.places, expected.places)
        assert micro.layout.num_scores == expected.layout.num_scores
        for ours, theirs in zip(micro.layout[:-1], expected.layout[:-1], strict=True):
            np.testing.assert_array_equal(ours, theirs)


@given(
    lengths=st.lists(st.integers(1, 50), min_size=1, max_size=40),
    world=st.integers(1, 5),
    budget=st.integers(20, 200),
    least=st.integers(1, 4),
)
def test_every_row_is_some_ranks_once_and_ranks_pass_equally_often(
    lengths: list[int], world: int, budget: int, least: int
) -> None:
    cut = split(np.array(lengths), world, budget, least=least)
    assert len(cut) == world
    assert len({len(micro) for micro in cut}) == 1
    assert sorted(np.concatenate([np.concatenate(micro) for micro in cut])) == list(range(len(lengths)))
    for places in (own for micro in cut for own in micro if own.size):
        widest = max(lengths[place] for place in places)
        assert places.size == 1 or widest * places.size <= budget


def test_ranks_get_nearly_equal_tokens() -> None:
    lengths = np.random.default_rng(0).integers(20, 200, size=64)
    tokens = [sum(lengths[own].sum() for own in micro) for micro in split(lengths, 4, 10**6)]
    assert max(tokens) - min(tokens) <= lengths.max()
