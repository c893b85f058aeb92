"""The order of rows: every row once an epoch, the same for every world, whatever the window."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recray.train.order import Order, rows_of_step


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
