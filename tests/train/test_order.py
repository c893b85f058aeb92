"""The order of rows: every row once an epoch, the same for every world, whatever the window."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recray.train.order import Order, rows_of_step
from recray.train.units import split


@given(
    num_rows=st.integers(1, 60),
    global_batch=st.integers(1, 25),
    window=st.integers(1, 70),
    seed=st.integers(0, 5),
)
def test_every_row_is_read_once_an_epoch(num_rows: int, global_batch: int, window: int, seed: int) -> None:
    order = Order(num_rows, global_batch, seed, window)
    epochs = 3
    steps = -(-epochs * num_rows // global_batch)
    rows = np.concatenate([rows_of_step(order, step) for step in range(steps)])
    for epoch in range(epochs):
        assert sorted(rows[epoch * num_rows : (epoch + 1) * num_rows]) == list(range(num_rows))


@given(
    num_rows=st.integers(1, 60),
    batches=st.tuples(st.integers(1, 25), st.integers(1, 25)),
    window=st.integers(1, 70),
    seed=st.integers(0, 5),
    first=st.integers(0, 200),
)
def test_which_row_comes_where_is_no_matter_of_batches(
    num_rows: int, batches: tuple[int, int], window: int, seed: int, first: int
) -> None:
    def at(position: int, batch: int) -> int:
        rows = rows_of_step(Order(num_rows, batch, seed, window), position // batch)
        return int(rows[position % batch])

    for position in range(first, first + 10):
        assert at(position, batches[0]) == at(position, batches[1])


@given(
    num_rows=st.integers(1, 200),
    global_batch=st.integers(1, 40),
    window=st.integers(1, 300),
    seed=st.integers(0, 2**40),
    step=st.integers(0, 10_000),
    worlds=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    cut=st.tuples(st.integers(1, 500), st.integers(1, 6)),
)
def test_ranks_and_micro_batches_share_out_the_batch_of_the_step_and_nothing_else(
    num_rows: int,
    global_batch: int,
    window: int,
    seed: int,
    step: int,
    worlds: tuple[int, int],
    cut: tuple[int, int],
) -> None:
    rows = rows_of_step(Order(num_rows, global_batch, seed, window), step)
    assert rows.size == global_batch  # never ragged: what an epoch leaves over is filled up from the next
    lengths = 5 + rows % 17
    for world, (budget, least) in ((worlds[0], cut), (worlds[1], (10**6, 1))):
        ranks = split(lengths, world, budget, least=least)
        assert len({len(micro) for micro in ranks}) == 1
        places = np.concatenate([np.concatenate(micro) for micro in ranks])
        np.testing.assert_array_equal(np.sort(places), np.arange(global_batch))
        np.testing.assert_array_equal(np.sort(rows[places]), np.sort(rows))


@pytest.mark.parametrize("num_rows", [10**6, 10**9])
def test_a_step_takes_the_memory_of_a_window_however_many_rows_there_are(num_rows: int) -> None:
    order = Order(num_rows, 509, seed=1)
    rows_of_step(order, 0)
    tracemalloc.start()
    rows = rows_of_step(order, num_rows // 509)  # from one epoch into the next
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert rows.size == 509
    assert peak < 4 * 2**20


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    first = rows_of_step(Order(50, 50, 0), 0)
    assert not np.array_equal(first, np.arange(50))
    assert not np.array_equal(first, rows_of_step(Order(50, 50, 0), 1))
    assert not np.array_equal(first, rows_of_step(Order(50, 50, 1), 0))
    np.testing.assert_array_equal(first, rows_of_step(Order(50, 50, 0), 0))


def test_a_step_stays_in_few_windows() -> None:
    order = Order(num_rows=10_000, global_batch=50, seed=0, window_rows=500)
    windows = [len(np.unique(rows_of_step(order, step) // 500)) for step in range(200)]
    assert max(windows) <= 2


@pytest.mark.parametrize(("rows", "step"), [(0, 0), (3, -1)])
def test_no_rows_and_negative_steps_are_refused(rows: int, step: int) -> None:
    with pytest.raises(ValueError, match="expected at least one row"):
        rows_of_step(Order(rows, 2, 0), step)
