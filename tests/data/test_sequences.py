"""Every split against its definition in plain loops over users."""

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recray.data.hashing import mix
from recray.data.sequences import (
    TARGETS,
    Cut,
    cut_at_times,
    cut_before_targets,
    cut_last,
    cut_moments,
    drawn_candidates,
    evaluation_rows,
    examples_of,
    fewest_draws,
    list_size,
    targets_of,
    targets_of_published,
    training_of,
    training_of_published,
    user_lengths,
    user_times,
    users_of,
)
from recray.schema import EVALUATION, INTERACTIONS, ITEMS


def random_log(seed: int, rows: int = 400, users: int = 30, items: int = 50) -> pa.Table:
    generator = np.random.default_rng(seed)
    columns = [
        [f"u{number}" for number in generator.integers(0, users, rows)],
        generator.integers(0, items, rows).astype(np.int32),
        generator.integers(0, 40, rows),
        pa.nulls(rows, pa.float32()),
        generator.integers(0, 2**60, rows),
    ]
    return pa.table(columns, schema=INTERACTIONS)


def logs_of(log: pa.Table) -> dict[str, list[tuple[int, int]]]:
    """The definition: (time, item) of each user in order of (time, tie_break)."""
    rows = sorted(log.to_pylist(), key=lambda row: (row["user_id"], row["time"], row["tie_break"]))
    logs: dict[str, list[tuple[int, int]]] = {}
    for row in rows:
        logs.setdefault(row["user_id"], []).append((row["time"], row["item"]))
    return logs


def test_users_are_whole_and_in_order() -> None:
    log = random_log(0)
    users = users_of(log)
    expected = logs_of(log)
    assert users["user_id"].to_pylist() == sorted(expected)
    for row in users.to_pylist():
        assert list(zip(row["times"], row["items"], strict=True)) == expected[row["user_id"]]
    assert users_of(log.take(np.random.default_rng(1).permutation(log.num_rows))).equals(users)
    assert users_of(log.slice(0, 0)).num_rows == 0


def loops(cut: Cut, users: pa.Table) -> Iterator[tuple[str, list[int], int, list[int]]]:
    first = 0
    for row, length in zip(users.to_pylist(), cut.train_length.tolist(), strict=True):
        parts = cut.part[first : first + len(row["items"])].tolist()
        first += len(parts)
        yield row["user_id"], row["items"], length, parts


@pytest.mark.parametrize("last", [1, 2, 5])
def test_leave_last(last: int) -> None:
    log = random_log(1)
    users = users_of(log)
    cut = cut_last(user_lengths(users), last)
    for _, items, length, parts in loops(cut, users):
        if len(items) < 2 * last + 1:
            assert length == len(items)
            assert set(parts) == {0}
        else:
            assert parts == [0] * (len(items) - 2 * last) + [1] * last + [2] * last
            assert length == len(items) - 2 * last


def test_time_cut() -> None:
    log = random_log(2)
    users = users_of(log)
    moments = cut_moments(user_times(users), validation=0.2, test=0.1)
    cut = cut_at_times(user_lengths(users), user_times(users), validation_from=moments[0], test_from=moments[1])
    times = logs_of(log)
    for user, items, length, parts in loops(cut, users):
        assert parts == [0 if time < moments[0] else 1 if time < moments[1] else 2 for time, _ in times[user]]
        assert length == parts.count(0) == (parts + [1]).index(1 if 1 in parts else 2 if 2 in parts else 1)
        assert len(items) == len(parts)


def test_moments_are_quantiles() -> None:
    times = np.random.default_rng(0).permutation(1000)
    assert cut_moments(times, validation=0.1, test=0.1) == (800, 900)
    assert cut_moments(np.array([5, 5, 5]), validation=0.1, test=0.1) == (5, 5)


def test_examples_are_the_latest_cuts() -> None:
    users = users_of(random_log(3))
    length = np.maximum(0, user_lengths(users) - 3)
    training = training_of(users, length, examples_per_user=4)
    expected = []
    for row, cut in zip(users.to_pylist(), length.tolist(), strict=True):
        for place in range(max(1, cut - 4), cut):
            history = row["items"][max(0, place - 5) : place]
            expected.append({"user_id": row["user_id"], "history": history, "target": row["items"][place]})
    assert examples_of(training, max_history=5).to_pylist() == expected
    assert training.num_rows == (length >= 2).sum()


def test_targets_have_all_that_came_before_and_nothing_after() -> None:
    users = users_of(random_log(4))
    cut = cut_last(user_lengths(users), 2)
    targets, counts = targets_of(users, cut, "test", most_per_user=2, most=10**6, seed=0)
    assert targets.schema == TARGETS
    expected = [
        (row["user_id"], row["items"][:place], row["items"][place])
        for row in users.to_pylist()
        for place in range(len(row["items"]) - 2, len(row["items"]))
        if len(row["items"]) >= 5
    ]
    ordered = fewest_draws(targets, 10**6).to_pylist()
    assert [(row["user_id"], row["met"], row["target"]) for row in ordered] == expected
    assert counts == {
        "held_out": len(expected), "without_history": 0, "beyond_targets_per_user": 0, "eligible": len(expected),
    }  # fmt: skip


def test_a_first_interaction_can_be_no_target() -> None:
    users = users_of(random_log(8))
    cut = cut_at_times(user_lengths(users), user_times(users), validation_from=0, test_from=0)
    targets, counts = targets_of(users, cut, "test", most_per_user=10**6, most=10**6, seed=0)
    assert counts["without_history"] == users.num_rows
    assert counts["eligible"] == targets.num_rows == 400 - users.num_rows
    assert all(targets["met"].to_pylist())


def test_limits_choose_by_hash_and_add_up() -> None:
    log = random_log(5, rows=3000, users=200)
    users = users_of(log)
    cut = cut_at_times(user_lengths(users), user_times(users), validation_from=0, test_from=20)
    everything, _ = targets_of(users, cut, "test", most_per_user=10**6, most=10**6, seed=0)
    few, counts = targets_of(users, cut, "test", most_per_user=3, most=100, seed=0)
    assert few.num_rows == 100
    assert counts["held_out"] == counts["without_history"] + counts["beyond_targets_per_user"] + counts["eligible"]
    assert counts["held_out"] == (user_times(users) >= 20).sum()
    per_user = {}
    for user in few["user_id"].to_pylist():
        per_user[user] = per_user.get(user, 0) + 1
    assert max(per_user.values()) <= 3
    keys = {(row["user_id"], row["order"]) for row in everything.to_pylist()}
    chosen = {(row["user_id"], row["order"]) for row in few.to_pylist()}
    assert chosen < keys
    # Not the first: places of the chosen are spread as all are.
    places = [place for _, place in keys]
    assert abs(np.mean([place for _, place in chosen]) - np.mean(places)) < 3 * np.std(places) / 10
    other, _ = targets_of(users, cut, "test", most_per_user=3, most=100, seed=1)
    assert {(row["user_id"], row["order"]) for row in other.to_pylist()} != chosen


def test_a_choice_made_in_parts_is_the_choice_of_the_whole() -> None:
    users = users_of(random_log(6, rows=1000, users=80))
    lengths = user_lengths(users)
    whole, _ = targets_of(users, cut_last(lengths, 1), "test", most_per_user=1, most=20, seed=0)
    parts = []
    for rows in (users.slice(0, 33), users.slice(33)):
        parts.append(targets_of(rows, cut_last(user_lengths(rows), 1), "test", most_per_user=1, most=20, seed=0)[0])
    assert fewest_draws(pa.concat_tables(parts), 20).equals(fewest_draws(whole, 20))


def published(rows: list[tuple[str, str, list[int], int, list[int] | None]]) -> pa.Table:
    columns = list(zip(*rows, strict=True))
    schema = [("row", pa.int64()), ("split", pa.string()), ("user_id", pa.string()), ("history", ITEMS)]
    schema += [("target", pa.int32()), ("candidates", ITEMS)]
    return pa.table([list(range(len(rows))), *map(list, columns)], schema=pa.schema(schema))


def test_published_windows_become_one_history() -> None:
    rows = published(
        [
            ("train", "a", [1, 2], 3, None),
            ("train", "b", [7], 8, None),
            ("train", "a", [1, 2, 3], 4, None),
            ("train", "a", [2, 3, 4], 5, None),  # a window that slides
            ("train", "a", [9, 9], 6, None),  # another history
            ("train", "b", [1, 8], 9, None),  # shares an end, not the whole tail
            ("train", "c", [1, 2], 3, None),
        ]
    )
    training = training_of_published(rows, examples_per_user=100)
    assert [tuple(row.values()) for row in training.to_pylist()] == [
        ("a", 0, [1, 2, 3, 4, 5], 2),
        ("a", 4, [9, 9, 6], 2),
        ("b", 1, [7, 8], 1),
        ("b", 5, [1, 8, 9], 2),
        ("c", 6, [1, 2, 3], 2),
    ]
    examples = examples_of(training, max_history=3).to_pylist()
    assert sorted((row["user_id"], row["history"], row["target"]) for row in examples) == sorted(
        (row["user_id"], row["history"][-3:], row["target"]) for row in rows.to_pylist()
    )
    latest = training_of_published(rows, examples_per_user=2)
    assert latest["first_target"].to_pylist() == [4, 2, 1, 2, 2]  # a: one of the first, one of the second history
    assert training_of_published(rows, examples_per_user=1)["first_target"].to_pylist() == [5, 2, 2, 2, 2]


def test_training_ends_before_the_first_published_target() -> None:
    users = pa.table(
        {
            "user_id": ["a", "b", "c", "d"],
            "items": pa.array([[1, 2, 3, 4, 5], [2, 1, 3, 1, 4], [1, 2], [4, 5, 6]], ITEMS),
        }
    )
    targets = pa.table(
        {
            "user_id": ["a", "a", "b", "d", "nobody"],
            "target": pa.array([4, 5, 1, 99, 1], pa.int32()),
            "last": pa.array([3, 4, 3, 6, 1], pa.int32()),  # b: 1 stands twice, but follows 3 at place 3 only
        }
    )
    assert cut_before_targets(users, targets).tolist() == [3, 3, 2, 3]


def test_published_rows_with_candidates_come_first() -> None:
    rows = published([("test", f"u{n}", [1], 2, [2, 3] if n % 4 == 0 else None) for n in range(40)])
    targets = fewest_draws(targets_of_published(rows, "test", seed=0), 10)
    assert targets["candidates"].null_count == 0
    assert fewest_draws(targets_of_published(rows, "test", seed=0), 15)["candidates"].null_count == 5
    assert targets_of_published(rows, "validation", seed=0).num_rows == 0


def draw(
    met: list[list[int]], target: list[int], count: int, num_items: int, rows: list[int] | None = None
) -> list[list[int]]:
    keys = mix(0, np.array(rows if rows is not None else range(len(met))))
    lists = drawn_candidates(
        pa.array(met, ITEMS), np.array(target, dtype=np.int32), keys, count=count, num_items=num_items
    )
    return lists.to_pylist()


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_candidates_hold_the_target_once_and_nothing_met(data: st.DataObject) -> None:
    num_items = data.draw(st.integers(2, 40))
    item = st.integers(0, num_items - 1)
    met = data.draw(st.lists(st.lists(item, max_size=60), min_size=1, max_size=8))
    target = [data.draw(item) for _ in met]
    count = data.draw(st.integers(2, 60))
    for mine, wanted, candidates in zip(met, target, draw(met, target, count, num_items), strict=True):
        assert candidates.count(wanted) == 1
        assert len(set(candidates)) == len(candidates)
        assert not (set(candidates) - {wanted}) & set(mine)
        assert len(candidates) == min(count, len(set(range(num_items)) - set(mine) - {wanted}) + 1)


def test_draws_do_not_depend_on_the_target_and_are_nested() -> None:
    def negatives(target: int, count: int, met: list[int]) -> list[int]:
        candidates = draw([met], [target], count, 1000, rows=[5])[0]
        return [item for item in candidates if item != target]

    reference = negatives(0, 40, [])
    for target in (1, 2, 3):
        other = negatives(target, 40, [])
        assert [item for item in other if item != 0][:38] == [item for item in reference if item != target][:38]
    assert negatives(0, 10, []) == reference[:9]
    assert negatives(0, 10, [reference[0]]) == reference[1:10]


def test_draws_are_nested_even_where_nearly_all_is_met() -> None:
    for count in range(2, 12):
        small = [item for item in draw([list(range(10))], [20], count, 21)[0] if item != 20]
        large = [item for item in draw([list(range(10))], [20], 12, 21)[0] if item != 20]
        assert small == large[: len(small)]


def test_candidates_and_places_are_uniform() -> None:
    rows = 20_000
    lists = np.array(draw([[0, 1]] * rows, [2] * rows, 5, 20))
    counts = np.bincount(lists[lists != 2], minlength=20)
    assert counts[:3].tolist() == [0, 0, 0]
    expected = rows * 4 / 17
    assert abs(counts[3:] - expected).max() < 5 * expected**0.5
    places = np.bincount(np.nonzero(lists == 2)[1], minlength=5)
    assert abs(places - rows / 5).max() < 5 * (rows / 5) ** 0.5


def rows_of(targets: pa.Table, first_row: int = 0) -> pa.Table:
    return evaluation_rows(
        targets, first_row=first_row, num_candidates=6, num_items=100, max_history=3, split="test", seed=0
    )


def test_evaluation_rows_keep_published_candidates() -> None:
    rows = published(
        [
            ("test", "a", [1, 2, 3, 4, 5], 9, [9, 10, 11]),
            ("test", "b", [1], 9, [10, 11, 10]),  # without the target, with a repetition
            ("test", "c", [4], 9, None),
        ]
    )
    targets = targets_of_published(rows, "test", seed=0).sort_by("user_id")
    made = rows_of(targets)
    assert made.cast(EVALUATION)["history"].to_pylist() == [[3, 4, 5], [1], [4]]
    candidates = made["candidates"].to_pylist()
    assert candidates[0] == [9, 10, 11]
    assert [item for item in candidates[1] if item != 9] == [10, 11]
    assert candidates[1].count(9) == 1
    assert len(candidates[2]) == 6
    assert list_size(targets, 6) == 3
    assert list_size(targets.slice(2), 6) == 6


def test_rows_are_the_same_in_one_chunk_or_several() -> None:
    users = users_of(random_log(7))
    targets, _ = targets_of(users, cut_last(user_lengths(users), 1), "test", most_per_user=1, most=100, seed=0)
    targets = fewest_draws(targets, 100)
    whole = rows_of(targets)
    parts = pa.concat_tables([rows_of(targets.slice(0, 7)), rows_of(targets.slice(7), 7)])
    assert parts.combine_chunks().equals(whole.combine_chunks())
