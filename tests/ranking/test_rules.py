"""Rules without learning: hand values, each definition in loops, and what a planted order or list gives away."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recray import schema
from recray.ranking.behaviour import Listed, Recency, RecentPopularity, Transitions
from recray.ranking.orders import (
    Order,
    _springs,
    ascending_share,
    consecutive,
    order_of_histories,
    order_of_ids,
    order_of_titles,
)
from recray.ranking.rules import (
    OTHERS_ASKED,
    ListOverlap,
    Lists,
    NearestInOrder,
    NextInOrder,
    Position,
    Rows,
    TargetShare,
    found_first,
)

ITEMS = 12


def ints(values: list[int]) -> np.ndarray:
    return np.array(values, dtype=np.int64)


def rows_of(histories: list[list[int]], candidates: list[list[int]]) -> Rows:
    flat = [[item for row in lists for item in row] for lists in (histories, candidates)]
    lengths = [[len(row) for row in lists] for lists in (histories, candidates)]
    return Rows(ints(flat[0]), ints(lengths[0]), ints(flat[1]), ints(lengths[1]))


def lists_of(candidates: list[list[int]], targets: list[int]) -> Lists:
    flat = [item for row in candidates for item in row]
    return Lists(ints(flat), ints([len(row) for row in candidates]), ints(targets))


def identity(known: list[int] | None = None) -> Order:
    mask = np.ones(ITEMS, dtype=bool) if known is None else np.isin(np.arange(ITEMS), known)
    return Order("id", np.arange(ITEMS), mask)


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[list[int]], list[list[int]], list[int]]:
    """Histories (some empty), candidate lists, and a target of each."""
    item = st.integers(0, ITEMS - 1)
    count = draw(st.integers(1, 6))
    histories = draw(st.lists(st.lists(item, max_size=5), min_size=count, max_size=count))
    candidates = draw(st.lists(st.lists(item, min_size=1, max_size=6, unique=True), min_size=count, max_size=count))
    return histories, candidates, [row[draw(st.integers(0, len(row) - 1))] for row in candidates]


def per_candidate(histories: list[list[int]], candidates: list[list[int]]) -> list[tuple[list[int], list[int], int]]:
    return [(h, row, c) for h, row in zip(histories, candidates, strict=True) for c in row]


def test_rows_are_taken_from_the_evaluation_table() -> None:
    row = {"row": 0, "user_id": "u", "history": [1, 2], "target": 4, "candidates": [3, 4, 5]}
    rows = Rows.of(pa.Table.from_pylist([row, {**row, "candidates": [7]}], schema=schema.EVALUATION))
    assert rows.met.tolist() == [1, 2, 1, 2]
    assert rows.owners.tolist() == [0, 0, 0, 1]
    assert rows.places.tolist() == [0, 1, 2, 0]


def test_found_first_takes_no_ties() -> None:
    rows = rows_of([[0], [0], [0]], [[1, 2, 3], [1, 2], [4]])
    scores = np.array([3.0, 1.0, 2.0, 5.0, 5.0, -np.inf])
    assert found_first(scores, rows, ints([1, 1, 4])).tolist() == [True, False, False]
    assert found_first(scores, rows, ints([2, 2, 4])).tolist() == [False, False, False]


@given(cases(), st.integers(0, 5))
def test_found_first_is_rank_one(case: tuple[list[list[int]], list[list[int]], list[int]], seed: int) -> None:
    histories, candidates, targets = case
    rows = rows_of(histories, candidates)
    scores = np.random.default_rng(seed).integers(0, 3, len(rows.candidates)).astype(np.float64)
    expected, start = [], 0
    for row, target in zip(candidates, targets, strict=True):
        own = dict(zip(row, scores[start : start + len(row)], strict=True))
        expected.append(all(own[target] > score for item, score in own.items() if item != target))
        start += len(row)
    assert found_first(scores, rows, ints(targets)).tolist() == expected


def test_the_smallest_above_and_the_nearest_by_hand() -> None:
    rows = rows_of([[9, 5]], [[7, 6, 2, 5, 4]])
    assert NextInOrder(identity())(rows).tolist() == [-2, -1, -np.inf, -np.inf, -np.inf]
    assert NextInOrder(identity(), descending=True)(rows).tolist() == [-np.inf, -np.inf, -3, -np.inf, -1]
    assert NearestInOrder(identity())(rows).tolist() == [-2, -1, -3, -np.inf, -1]


@given(cases(), st.lists(st.integers(0, ITEMS - 1), unique=True), st.booleans())
def test_orders_score_as_their_definition(
    case: tuple[list[list[int]], list[list[int]], list[int]], known: list[int], descending: bool
) -> None:
    histories, candidates, _ = case
    order = Order("number", 100 - 7 * np.arange(ITEMS), np.isin(np.arange(ITEMS), known))
    following, nearest = [], []
    for history, _row, c in per_candidate(histories, candidates):
        comparable = bool(history) and c in known and history[-1] in known
        gap = int(order.values[c] - order.values[history[-1]]) if comparable else 0
        gap = -gap if descending else gap
        following.append(-gap if gap > 0 else -np.inf)
        nearest.append(-abs(gap) if gap != 0 else -np.inf)
    rows = rows_of(histories, candidates)
    assert NextInOrder(order, descending)(rows).tolist() == following
    assert NearestInOrder(order)(rows).tolist() == nearest


def test_ids_are_numbers_where_all_are() -> None:
    assert order_of_ids("id", pa.array(["10", "9", "-1", "+3"])).values.tolist() == [10, 9, -1, 3]
    assert order_of_ids("id", pa.array(["10", "9", "b"])).values.tolist() == [0, 1, 2]
    assert order_of_ids("id", pa.chunked_array([["B07"], ["A99"]])).values.tolist() == [1, 0]
    assert order_of_ids("id", pa.array(["9" * 30, "1"])).values.tolist() == [1, 0]  # too long for a number


def test_titles_are_ordered_without_capitals_and_equal_ones_share_a_place() -> None:
    assert order_of_titles(pa.array(["beta", "Alpha", "Beta", "alpha 2"])).values.tolist() == [2, 0, 2, 1]


def test_neighbours_stay_within_a_history() -> None:
    first, second = consecutive(ints([1, 2, 3, 4, 5]), ints([3, 0, 1, 1]))
    assert list(zip(first.tolist(), second.tolist(), strict=True)) == [(1, 2), (2, 3)]


def test_the_share_that_ascends_leaves_out_what_cannot_be_compared() -> None:
    order = Order("id", ints([0, 1, 2, 2]), np.array([True, True, True, True]))
    assert ascending_share(order, ints([0, 1, 2, 2]), ints([1, 0, 3, 0])) == pytest.approx(1 / 3)
    unknown = Order("id", ints([0, 1]), np.array([True, False]))
    assert np.isnan(ascending_share(unknown, ints([0]), ints([1])))


def _walks(rng: np.random.Generator, secret: np.ndarray, *, are_sorted: bool) -> tuple[np.ndarray, np.ndarray]:
    histories = [rng.choice(len(secret), 12, replace=False) for _ in range(400)]
    if are_sorted:
        histories = [history[np.argsort(secret[history])] for history in histories]
    return consecutive(np.concatenate(histories), np.full(400, 12))


def test_the_order_that_histories_follow_is_found_though_no_id_holds_it() -> None:
    rng = np.random.default_rng(0)
    secret = rng.permutation(150)
    found = order_of_histories(*_walks(rng, secret, are_sorted=True), 151, seed=0)
    assert np.corrcoef(found.values[:150], secret)[0, 1] > 0.99
    assert found.known.tolist() == [True] * 150 + [False]  # the last item is in no history
    again = _walks(rng, secret, are_sorted=True)
    assert ascending_share(found, *again) > 0.95
    free = order_of_histories(*_walks(rng, secret, are_sorted=False), 150, seed=0)
    assert ascending_share(free, *_walks(rng, secret, are_sorted=False)) < 0.6


def test_springs_put_a_chain_in_line_and_leave_others_at_rest() -> None:
    place = _springs(ints([0, 1, 1]), ints([1, 2, 3]), ints([1, 3, 1, 1, 0]))
    assert place[0] < place[1] < place[2] == place[3]
    assert place[1] - place[0] == pytest.approx(1, abs=0.1)
    assert place[4] == 0


def test_an_order_of_very_many_pairs_is_fitted_to_a_part_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("recray.ranking.orders._PAIRS", 800)
    rng = np.random.default_rng(1)
    secret = rng.permutation(100)
    found = order_of_histories(*_walks(rng, secret, are_sorted=True), 100, seed=0)
    assert np.corrcoef(found.values, secret)[0, 1] > 0.9


def test_the_place_of_most_targets_is_counted_from_start_and_end() -> None:
    first = Position.of(lists_of([[4, 1, 2], [5, 6], [7, 8, 9]], [4, 5, 8]))
    assert not first.from_end
    assert found_first(first(rows_of([[0]], [[3, 2, 1]])), rows_of([[0]], [[3, 2, 1]]), ints([3])).tolist() == [True]
    last = Position.of(lists_of([[4, 1, 2], [5, 6], [7, 8, 9, 3]], [2, 6, 3]))
    assert last.from_end
    scores = last(rows_of([[0]], [[3, 2, 1, 4, 5]]))
    assert int(scores.argmax()) == 4
    assert scores[:4].max() < scores[4]


def test_the_share_of_lists_in_which_an_item_was_the_target() -> None:
    rule = TargetShare.of(lists_of([[1, 2, 3], [1, 4], [2, 5]], [1, 4, 2]), ITEMS)
    scores = rule(rows_of([[0]], [[1, 2, 3, 4, 6]]))
    assert scores.tolist() == [0.5, 0.5, 0.0, 1.0, 0.0]


def test_a_target_that_its_list_lacks_is_counted_once() -> None:
    rule = TargetShare.of(lists_of([[2, 3]], [1]), ITEMS)
    assert rule(rows_of([[0]], [[1, 2]])).tolist() == [1.0, 0.0]


@given(cases(), cases())
def test_overlap_is_its_definition(
    known: tuple[list[list[int]], list[list[int]], list[int]],
    asked: tuple[list[list[int]], list[list[int]], list[int]],
) -> None:
    _, lists, targets = known
    expected = []
    for _history, row, c in per_candidate(asked[0], asked[1]):
        others = [d for d in row[:OTHERS_ASKED] if d != c]
        total = 0.0
        for d in others:
            holding = [d in each for each, target in zip(lists, targets, strict=True) if target == c]
            total += bool(any(holding)) + 1e-3 * (sum(holding) / len(holding) if holding else 0.0)
        expected.append(total / max(1, len(others)))
    found = ListOverlap.of(lists_of(lists, targets), ITEMS)(rows_of(asked[0], asked[1]))
    np.testing.assert_allclose(found, expected, atol=1e-12)


def test_negatives_that_follow_the_target_are_found_without_a_history() -> None:
    rng = np.random.default_rng(0)
    of_target = {target: rng.choice(1000, 19, replace=False) for target in range(300)}
    made = []
    for target in rng.integers(0, 300, 900):
        made.append((rng.permutation([*of_target[int(target)], target]), int(target)))
    known = Lists(np.concatenate([each for each, _ in made[:600]]), np.full(600, 20), ints([t for _, t in made[:600]]))
    asked, targets = np.concatenate([each for each, _ in made[600:]]), ints([t for _, t in made[600:]])
    rows = Rows(np.zeros(300, dtype=np.int64), np.ones(300, dtype=np.int64), asked, np.full(300, 20))
    taught = np.isin(targets, known.targets)
    found = found_first(ListOverlap.of(known, 1000)(rows), rows, targets)
    assert found[taught].mean() > 0.95
    assert not found[~taught].any()


def test_recency_is_the_place_of_the_last_meeting() -> None:
    rows = rows_of([[3, 4, 3, 5], [], [4]], [[3, 4, 6], [3], [3, 4]])
    assert Recency(ITEMS)(rows).tolist() == [3, 2, 0, 0, 0, 1]
    assert Recency(ITEMS)(rows_of([[]], [[1, 2]])).tolist() == [0, 0]


def test_recent_popularity_halves_after_a_twentieth_of_the_span() -> None:
    rule = RecentPopularity.of(ints([1, 2, 2, 3]), ints([100, 95, 95, 0]), ITEMS)
    scores = rule(rows_of([[0]], [[1, 2, 3, 4]]))
    np.testing.assert_allclose(scores, [1.0, 1.0, 0.5**20, 0.0])
    assert not RecentPopularity.of(ints([]), ints([]), ITEMS).weight.any()


def test_transitions_count_what_follows_and_fall_back_to_popularity() -> None:
    rule = Transitions.of(ints([1, 1, 2]), ints([2, 2, 3]), np.bincount([1, 1, 2, 2, 3], minlength=ITEMS))
    scores = rule(rows_of([[5, 1], [2], []], [[2, 1, 3], [2, 3], [1, 4]]))
    np.testing.assert_allclose(scores, [2 + 2 / 3, 2 / 3, 1 / 3, 2 / 3, 1 + 1 / 3, 2 / 3, 0])
    nothing = Transitions.of(ints([]), ints([]), np.zeros(ITEMS, dtype=np.int64))
    assert nothing(rows_of([[1]], [[2, 3]])).tolist() == [0, 0]


def test_a_model_of_lists_is_called_with_lists() -> None:
    def model(histories: list[np.ndarray], candidates: list[np.ndarray]) -> list[np.ndarray]:
        return [row * 100 + len(h) for h, row in zip(histories, candidates, strict=True)]

    rows = rows_of([[1, 2], [], [3]], [[1, 2], [3], [4, 5]])
    assert Listed(model)(rows).tolist() == [102, 202, 300, 401, 501]
    assert Listed(model)(rows_of([], [])).tolist() == []
