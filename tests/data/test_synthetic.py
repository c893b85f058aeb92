from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from recray.config import Synthetic
from recray.data.synthetic import LIKED, generate, make_world, visit
from recray.errors import DataError

SETTINGS = Synthetic(interactions=20_000)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("logs")
    generate(path, SETTINGS, seed=3)
    return path


def table(folder: Path, name: str) -> pa.Table:
    return pq.read_table(folder / f"{name}.parquet")


@pytest.mark.parametrize("interactions", [1000, 20_000, 100_000])
def test_one_number_sets_the_size(tmp_path: Path, interactions: int) -> None:
    generate(tmp_path, Synthetic(interactions=interactions), seed=0)
    log = table(tmp_path, "interactions")
    assert log.num_rows == interactions
    assert log.column_names == ["user_id", "item_id", "timestamp", "rating"]
    assert len(log["user_id"].unique()) == interactions // 50
    assert log.group_by(["user_id", "item_id"]).aggregate([]).num_rows == interactions  # nobody meets an item twice


def test_a_seed_is_a_world(folder: Path, tmp_path: Path) -> None:
    generate(tmp_path / "same", SETTINGS, seed=3)
    generate(tmp_path / "other", SETTINGS, seed=4)
    for name in ("interactions", "items", "truth"):
        assert table(tmp_path / "same", name).equals(table(folder, name))
        assert not table(tmp_path / "other", name).equals(table(folder, name))


def test_titles_are_distinct_and_ids_say_nothing(folder: Path) -> None:
    items = table(folder, "items")
    assert len(items["title"].unique()) == items.num_rows
    genre = pc.list_element(items["genres"], 0).combine_chunks().dictionary_encode().indices.to_numpy()
    assert abs(np.corrcoef(items["item_id"].to_numpy(), genre)[0, 1]) < 0.15


@pytest.mark.parametrize(("items", "genres"), [(2, 1), (7, 12), (300, 1), (5000, 40), (20_000, 12), (3000, 200)])
def test_any_catalogue_has_distinct_titles(items: int, genres: int) -> None:
    world = make_world(items, Synthetic(genres=genres), np.random.default_rng(0))
    assert len(set(world.titles)) == items
    assert np.bincount(world.on_shelf[world.weight_on_shelf > 0]).tolist() == [1] * items  # each on one shelf


def test_too_many_items_for_the_titles_are_refused() -> None:
    with pytest.raises(DataError, match="more than titles can tell apart"):
        make_world(1_000_000, Synthetic(genres=30), np.random.default_rng(0))


def test_popularity_has_a_long_tail(folder: Path) -> None:
    counts = np.sort(pc.value_counts(table(folder, "interactions")["item_id"]).field("counts").to_numpy())[::-1]
    tenth = len(counts) // 10
    assert counts[:tenth].sum() > 2.0 * counts.sum() / 10
    assert counts[-len(counts) // 2 :].sum() < 0.35 * counts.sum()


def test_time_runs_within_the_span(folder: Path) -> None:
    times = table(folder, "interactions")["timestamp"].to_numpy()
    assert np.datetime64("2022-01-01") <= times.min().astype("datetime64[s]")
    assert times.max().astype("datetime64[s]") <= np.datetime64("2024-01-01")


def test_order_carries_more_than_popularity(folder: Path) -> None:
    """The most frequent successor of the last item, learned from half of the users, against the most popular item."""
    log = table(folder, "interactions")
    users = log["user_id"].combine_chunks().dictionary_encode().indices.to_numpy()
    items = log["item_id"].to_numpy()
    follows = np.flatnonzero(users[1:] == users[:-1]) + 1
    half = users[follows] % 2 == 0
    size = items.max() + 1
    successors = np.zeros((size, size), dtype=np.int64)
    np.add.at(successors, (items[follows[half] - 1], items[follows[half]]), 1)
    guess = successors.argmax(axis=1)[items[follows[~half] - 1]]
    popular = np.bincount(items[follows[half]]).argmax()
    truth = items[follows[~half]]
    assert (guess == truth).mean() > 0.15
    assert (popular == truth).mean() < 0.05


def test_known_false_negatives_are_liked_and_unmet(folder: Path) -> None:
    log, truth = table(folder, "interactions"), table(folder, "truth")
    assert truth["user_id"].to_pylist() == log["user_id"].unique().to_pylist()
    met = {user: set() for user in truth["user_id"].to_pylist()}
    for user, item in zip(log["user_id"].to_pylist(), log["item_id"].to_pylist(), strict=True):
        met[user].add(item)
    liked = dict(zip(truth["user_id"].to_pylist(), truth["liked"].to_pylist(), strict=True))
    assert all(not met[user] & set(items) for user, items in liked.items())
    share = np.mean([len(items) for items in liked.values()]) / table(folder, "items").num_rows
    assert 0.02 < share < 0.2
    # What a user likes but has not met lies where they go: far more often than chance in the genres of their log.
    genre = dict(
        zip(table(folder, "items")["item_id"].to_pylist(), table(folder, "items")["genres"].to_pylist(), strict=True)
    )
    near = [
        np.mean([genre[item][0] in {genre[each][0] for each in met[user]} for item in items])
        for user, items in liked.items()
        if items and len(met[user]) < 20
    ]
    assert np.mean(near) > 0.6


def test_ratings_follow_the_truth() -> None:
    world = make_world(800, SETTINGS, np.random.default_rng(0))
    visits = visit(world, np.full(300, 30), SETTINGS, np.random.default_rng(1))
    assert 0.55 < (world.quality >= LIKED).mean() < 0.95
    good = world.quality[visits.item] > 0.8
    assert visits.liked[good].mean() > visits.liked[world.quality[visits.item] < 0.5].mean() + 0.15
    assert np.bincount(visits.user).tolist() == [30] * 300


def test_taste_drifts_towards_the_last_one() -> None:
    """How much more of the last interactions than of the first lie on shelves that a user likes in the end."""

    def gain(drift: float) -> float:
        settings = Synthetic(taste_drift=drift)
        world = make_world(3000, settings, np.random.default_rng(0))
        visits = visit(world, np.full(500, 30), settings, np.random.default_rng(1))
        shelves = np.zeros((500, world.shelf.max() + 1), dtype=bool)
        user, item = np.nonzero(visits.liked_unmet)
        shelves[user, world.shelf[item]] = True
        on_last_taste = shelves[visits.user, world.shelf[visits.item]]  # one step of all users after the other
        return float(on_last_taste[-500 * 8 :].mean() - on_last_taste[: 500 * 8].mean())

    assert abs(gain(0.0)) < 0.05
    assert gain(1.0) > 0.2
