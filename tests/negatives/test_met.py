"""What is left out, what is not, and how often negatives meet it."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from recray.errors import DataError
from recray.negatives import uniform
from recray.negatives.met import encounters, held_out, liked_but_never_met, met_in_training, of_rows
from recray.negatives.registry import SAMPLERS, prepared
from recray.schema import EXAMPLES, HISTORIES

ITEMS = pa.list_(pa.int32())


def _histories(*rows: tuple[str, list[int]]) -> pa.Table:
    return pa.Table.from_pylist(
        [{"row": at, "user_id": user, "items": items} for at, (user, items) in enumerate(rows)], schema=HISTORIES
    )


def _examples(*rows: tuple[str, list[int], int]) -> pa.Table:
    found = [
        {"row": at, "user_id": user, "history": history, "target": target}
        for at, (user, history, target) in enumerate(rows)
    ]
    return pa.Table.from_pylist(found, schema=EXAMPLES)


def _targets(*rows: tuple[str, int]) -> pa.Table:
    return _examples(*((user, [], target) for user, target in rows)).select(["user_id", "target"])


def _lists(found: Any) -> list[list[int]]:
    return [found.items[a:b].tolist() for a, b in zip(found.offsets[:-1], found.offsets[1:], strict=True)]


def test_met_is_the_union_of_all_the_users_training_rows() -> None:
    histories = _histories(("ann", [5, 3, 5]), ("bob", [1]), ("ann", [0]))
    examples = _examples(("bob", [2], 7), ("ann", [], 4), ("cy", [6], 6), ("bob", [8, 1], 2))
    met = met_in_training(histories, examples, 10)
    assert dict(zip(met.user_ids.to_pylist(), _lists(met.items), strict=True)) == {
        "ann": [0, 3, 4, 5],
        "bob": [1, 2, 7, 8],
        "cy": [6],
    }
    assert _lists(of_rows(met, pa.chunked_array([["cy", "bob"], ["cy"]]))) == [[6], [1, 2, 7, 8], [6]]
    with pytest.raises(DataError, match="user 'dee' has an example"):
        of_rows(met, pa.array(["ann", "dee"]))
    with pytest.raises(DataError, match="the catalogue has 8"):
        met_in_training(histories, examples, 8)


def test_encounters_by_hand() -> None:
    met = met_in_training(_histories(("ann", [0, 1]), ("bob", [2])), _examples(), 5)
    among = held_out(_targets(("ann", 3), ("ann", 1)), _targets(("ann", 4), ("cy", 0)), 5)
    negatives = np.array([[3, 2], [2, 3], [3, 0]], dtype=np.int32)
    users = pa.chunked_array([["ann", "ann", "bob"]])
    found = encounters(negatives, users, among, met, np.array([1.0, 1.0, 2.0, 3.0, 3.0]))
    # ann: 3 and 4 may be met by chance (1 can't, it is never drawn), of weight 2 + 3 + 3; bob holds nothing out.
    assert found == pytest.approx({"share": 2 / 6, "first_share": 1 / 3, "by_chance": (6 / 8 + 6 / 8 + 0) / 3})


@pytest.mark.parametrize("name", sorted(SAMPLERS))
def test_held_out_items_are_met_as_often_as_chance_says(name: str, known: Callable[..., dict[str, Any]]) -> None:
    rng = np.random.default_rng(0)
    users = [f"user {number}" for number in range(200)]
    walks = {user: rng.permutation(40)[:15].tolist() for user in users}
    examples = _examples(*((user, walk[:cut], walk[cut]) for user, walk in walks.items() for cut in range(2, 12)))
    met = met_in_training(_histories(*((user, walk[:12]) for user, walk in walks.items())), examples, 40)
    among = held_out(
        _targets(*((u, w[12]) for u, w in walks.items())), _targets(*((u, w[14]) for u, w in walks.items())), 40
    )
    sampler = prepared(name, known(np.asarray(examples["target"])))
    own = of_rows(met, examples["user_id"])
    negatives = sampler.draw(np.arange(2000), own.items, own.offsets, num=8, seed=0).negatives
    found = encounters(negatives, examples["user_id"], among, met, sampler.weights())
    # Of a user's 28 items that are left, any two are as likely to be the ones held out.
    assert found["share"] == pytest.approx(2 / 28, abs=0.02)
    assert found["first_share"] == pytest.approx(2 / 28, abs=0.03)
    if name in ("uniform", "popularity", "inverse_popularity"):
        spread = np.sqrt(found["by_chance"] / 2000)
        assert found["first_share"] == pytest.approx(found["by_chance"], abs=4 * spread)
    left_out = uniform.draw(np.arange(2000), *_with(own, among, examples["user_id"]), num=8, num_items=40, seed=0)
    assert encounters(left_out, examples["user_id"], among, met, np.ones(40))["share"] == 0  # what it must not be


def _with(own: Any, among: Any, users: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
    """Return what a sampler would leave out that also knew the answers."""
    more = of_rows(among, users)
    lists = [a + b for a, b in zip(_lists(own), _lists(more), strict=True)]
    return np.concatenate(lists).astype(np.int32), np.cumsum([0, *map(len, lists)])


def test_truth_is_counted_only_for_users_that_have_one() -> None:
    truth = pa.table({"user_id": ["ann", "bob"], "liked": pa.array([[3], []], ITEMS)})
    among = liked_but_never_met(truth, 5)
    met = met_in_training(_histories(("ann", [0]), ("bob", [1]), ("cy", [2])), _examples(), 5)
    users = pa.chunked_array([["cy", "ann", "bob"]])
    found = encounters(np.array([[3], [3], [3]], dtype=np.int32), users, among, met, np.ones(5))
    assert found == pytest.approx({"share": 1 / 3, "first_share": 1 / 3, "by_chance": (1 / 4) / 3})
