"""Facts of a split, counted by hand and in loops."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from recray.ranking.rules import Rows
from recray.ranking.split_facts import (
    Fact,
    Log,
    Training,
    duplicate_facts,
    met_before,
    row_facts,
    row_hashes,
    time_facts,
    times_of,
)

ITEMS = 10


def ints(values: list[int]) -> np.ndarray:
    return np.array(values, dtype=np.int64)


def rows_of(histories: list[list[int]]) -> Rows:
    return Rows(ints([i for row in histories for i in row]), ints([len(row) for row in histories]), ints([]), ints([]))


def training_of(histories: list[list[int]], users: list[int]) -> Training:
    return Training(ints([i for row in histories for i in row]), ints([len(row) for row in histories]), ints(users))


def numbers(facts: list[Fact]) -> list[tuple[int | None, int | None]]:
    return [(fact.number, fact.of) for fact in facts]


def test_row_facts_by_hand() -> None:
    training = training_of([[0, 1, 2], [3, 4]], [0, 1])
    rows, targets, users = rows_of([[0, 1], [3], [5, 6], [7]]), ints([2, 9, 5, 3]), ints([0, 1, -1, -2])
    # cold: 9 and 5; met: 2 by user 0 in training, 5 in its own history; 3 was met, but by another user
    assert numbers(row_facts(rows, targets, users, training, ITEMS)) == [(2, 4), (2, 4), (2, 4), (4, 4)]


def test_the_ten_largest_users_of_twelve() -> None:
    users = ints([0] * 5 + list(range(1, 12)))
    rows = rows_of([[0]] * len(users))
    facts = row_facts(rows, ints([1] * len(users)), users, training_of([[0, 1]], [0]), ITEMS)
    assert numbers(facts)[3] == (14, 16)


small = st.integers(0, ITEMS - 1)


@given(st.lists(st.tuples(st.lists(small, max_size=4), small, st.integers(-1, 3)), min_size=1, max_size=6), st.data())
def test_met_before_is_its_definition(rows: list[tuple[list[int], int, int]], data: st.DataObject) -> None:
    histories = data.draw(st.lists(st.tuples(st.lists(small, max_size=5), st.integers(0, 3)), max_size=5))
    training = training_of([items for items, _ in histories], [user for _, user in histories])
    found = met_before(
        rows_of([row[0] for row in rows]),
        ints([row[1] for row in rows]),
        ints([row[2] for row in rows]),
        training,
        ITEMS,
    )
    expected = [
        target in own or any(target in items for items, whose in histories if whose == user)
        for own, target, user in rows
    ]
    assert found.tolist() == expected


def test_rows_that_stand_elsewhere() -> None:
    rows, targets = rows_of([[1, 2], [1, 2], [2, 1], [1, 2], [1]]), ints([3, 3, 3, 4, 2])
    train = row_hashes(ints([1, 1, 2]), ints([1, 2]), ints([2, 9]))  # [1] -> 2 and [1, 2] -> 9
    assert numbers(duplicate_facts(rows, targets, train)) == [(2, 5), (1, 5)]


def test_a_hash_tells_order_length_and_target_apart() -> None:
    rows = [([1, 2], 3), ([2, 1], 3), ([1, 2], 4), ([1], 3), ([], 3), ([1, 2, 0], 3), ([0, 1, 2], 3)]
    met = rows_of([row for row, _ in rows])
    hashes = row_hashes(met.met, met.met_lengths, ints([target for _, target in rows]))
    assert len(set(hashes.tolist())) == len(rows)


def test_the_first_and_the_latest_meeting() -> None:
    log = Log(ints([0, 0, 1, 0]), ints([5, 5, 5, 6]), ints([30, 10, 20, 40]))
    asked = ints([0, 1, 0, -1]), ints([5, 5, 7, 5])
    assert times_of(log, *asked, ITEMS, latest=True).tolist() == [30, 20, -1, -1]
    assert times_of(log, *asked, ITEMS, latest=False).tolist() == [10, 20, -1, -1]
    assert times_of(Log(ints([]), ints([]), ints([])), *asked, ITEMS, latest=True).tolist() == [-1] * 4


def told(
    targets: list[int], users: list[int], training: Training, log: Log | None
) -> list[tuple[int | None, int | None]]:
    trained = None if log is None else times_of(log, training.owners, training.items, ITEMS, latest=False)
    return numbers(time_facts(ints(targets), ints(users), training, log, trained, ITEMS))


def test_training_from_the_future_is_counted() -> None:
    # user 0: 0 at 1, 1 at 2, 2 at 3; user 1: 3 at 10, 4 at 20, 5 at 5
    log = Log(ints([0, 0, 0, 1, 1, 1]), ints([0, 1, 2, 3, 4, 5]), ints([1, 2, 3, 10, 20, 5]))
    training = training_of([[0, 1], [3, 4]], [0, 1])
    assert told([2, 5], [0, 1], training, log) == [
        (2, 4),
        (1, 2),
    ]  # 10 and 20 are later than 4; user 1 is trained on what follows 5
    assert told([2], [0], training_of([[0, 1]], [0]), log) == [(0, 2), (0, 1)]


def test_without_a_clock_nothing_is_said() -> None:
    training = training_of([[0, 1]], [0])
    assert told([2], [0], training, None) == [(None, None)] * 2
    elsewhere = Log(ints([0]), ints([0]), ints([1]))
    assert told([2], [-1], training, elsewhere) == [(None, None)] * 2
