"""Feeds: which rows, whose negatives, and that the cut does not change what is in a step."""

import tracemalloc
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy import ndarray

from recray.config import Objective
from recray.data.catalogue import Catalogue
from recray.data.prompts import find_template
from recray.errors import ConfigError
from recray.objectives import sharing
from recray.train import feeding
from recray.train.feeding import AlignFeed, ExampleFeed, Share, StreamFeed, forbidden_items, windows_of
from recray.train.order import Order, rows_of_step
from recray.train.units import Unit

ORDER = Order(num_rows=24, global_batch=8, seed=5)


def align_feed(world, share: Share, **settings: object) -> AlignFeed:  # type: ignore[no-untyped-def]
    return AlignFeed(
        world.shards, world.catalogue, world.item_vectors, ORDER, share, Objective(**settings), num_negatives=3
    )


def whole(feed: AlignFeed, ranks: int, name: str, step: int = 2) -> np.ndarray:
    """An array of all ranks, put back into the order of the global batch."""
    units = [feed.unit(step, rank) for rank in range(ranks)]
    places = np.concatenate([unit.arrays["place"] for unit in units])
    return np.concatenate([unit.arrays[name] for unit in units])[np.argsort(places)]


@pytest.mark.parametrize("name", ["usable", "confidence"])
def test_what_users_may_borrow_does_not_depend_on_the_cut(world, name: str) -> None:  # type: ignore[no-untyped-def]
    one = whole(align_feed(world, Share(1, 10**6)), 1, name)
    assert one.shape == (8, 8, 3)
    for share in (Share(2, 10**6), Share(3, 100), Share(2, 10**6, least_micro_batches=3)):
        np.testing.assert_array_equal(whole(align_feed(world, share), share.world_size, name), one)


def test_a_unit_holds_the_rows_that_the_order_says(world) -> None:  # type: ignore[no-untyped-def]
    feed = align_feed(world, Share(2, 10**6))
    for step in range(4):
        expected = rows_of_step(ORDER, step).tolist()
        units = [feed.unit(step, rank) for rank in range(2)]
        assert [unit.rows for unit in units] == [expected, expected]
        assert sorted(np.concatenate([unit.arrays["place"] for unit in units])) == list(range(8))
        np.testing.assert_array_equal(
            units[0].arrays["reference"], world.shards.take(np.array(expected)).reference[:, :4]
        )


def test_the_guard_keeps_out_what_the_borrower_met_or_is_taught(world) -> None:  # type: ignore[no-untyped-def]
    rows = rows_of_step(ORDER, 2)
    examples = world.shards.take(rows)
    items = examples.items[:, :4]
    usable = whole(align_feed(world, Share(1, 10**6), sharing_fraction=1.0), 1, "usable")
    unguarded = whole(align_feed(world, Share(1, 10**6), sharing_fraction=1.0, guard=False), 1, "usable")
    caught = 0
    for borrower in range(8):
        for owner in range(8):
            for n in range(3):
                item = items[owner, 1 + n]
                bad = item in examples.met[borrower] or item == items[borrower, 0]
                same_user = examples.user[borrower] == examples.user[owner] and borrower != owner
                assert unguarded[borrower, owner, n] == (not same_user)
                expected = not same_user and (borrower == owner or not bad)
                assert usable[borrower, owner, n] == expected
                caught += bad and borrower != owner
    assert caught > 0


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("sharing", ["top_fraction", "none"])
def test_the_guard_by_nearness_keeps_out_what_the_borrower_likely_likes(world, sharing: str, own: bool) -> None:  # type: ignore[no-untyped-def]
    settings = {"sharing": sharing, "sharing_fraction": 1.0}
    near = {"guard_near": "mask", "guard_threshold": -0.2, "guard_own": own}
    guarded, plain = (align_feed(world, Share(1, 10**6), **settings, **more) for more in (near, {}))
    sure, usable, before = (
        whole(feed, 1, name) for feed, name in ((plain, "confidence"), (guarded, "usable"), (plain, "usable"))
    )
    np.testing.assert_array_equal(whole(guarded, 1, "confidence"), sure)
    mine = np.eye(8, dtype=bool)[:, :, None] if sharing != "none" else np.ones((8, 1, 1), dtype=bool)
    looked_at = np.broadcast_to(mine if own else False, before.shape) | ~mine
    expected = before & ~(looked_at & (sure < -0.2))
    np.testing.assert_array_equal(usable, expected)
    assert (expected != before).any() == (own or sharing != "none")


@pytest.mark.parametrize("own", [False, True])
def test_no_near_item_is_borrowed_to_be_scored(world, own: bool) -> None:  # type: ignore[no-untyped-def]
    settings = {"reuse": "item", "reuse_items": 30, "sharing_fraction": 1.0}
    near = {"guard_near": "mask", "guard_threshold": -0.2, "guard_own": own}
    guarded, plain = (align_feed(world, Share(1, 10**6), **settings, **more) for more in (near, {}))
    left_out = 0
    rows = world.shards.take(rows_of_step(ORDER, 2))
    usable = whole(guarded, 1, "usable")[:, 0]
    for place, (kept, before) in enumerate(zip(guarded.listed(2), plain.listed(2), strict=True)):
        sure = dict(zip(before.tolist(), plain._sure(rows, np.array([place]), before)[0].tolist(), strict=True))
        assert kept[4:].tolist() == [item for item in before[4:].tolist() if sure[item] >= -0.2]
        assert usable[place, :3].tolist() == [not own or sure[item] >= -0.2 for item in kept[1:4].tolist()]
        left_out += before.size - kept.size
    assert left_out > 0


def test_forbidden_items_of_some_users_are_rows_of_those_of_all(world) -> None:  # type: ignore[no-untyped-def]
    examples = world.shards.take(np.arange(6))
    items = examples.items[:, :4]
    every = forbidden_items(examples, items, np.arange(6))
    some = forbidden_items(examples, items, np.array([4, 1]))
    np.testing.assert_array_equal(some, every[[4, 1]])


@pytest.mark.parametrize("settings", [{"name": "sdpo"}, {"sharing": "none"}])
def test_without_sharing_everyone_uses_only_its_own(world, settings: dict[str, str]) -> None:  # type: ignore[no-untyped-def]
    usable = whole(align_feed(world, Share(1, 10**6), **settings), 1, "usable")
    np.testing.assert_array_equal(usable, np.ones((8, 1, 3), dtype=bool))


@pytest.mark.parametrize("window", [1, 3, 4, 20])
def test_every_item_is_a_target_once_an_epoch_whatever_the_shift(world, window: int) -> None:  # type: ignore[no-untyped-def]
    lengths = np.array([history.size for history in world.histories])
    rows = int(windows_of(lengths, window)[0].size)
    feed = StreamFeed(world.histories, world.catalogue, Order(rows, rows, 0), Share(1, 10**6), window_items=window)
    scored = []
    for epoch in range(4):
        items = [feed._items(row, epoch) for row in range(rows)]
        assert all(item.size for item in items)
        got = np.concatenate(items)
        np.testing.assert_array_equal(got, np.concatenate(world.histories))
        (micro,) = feed.unit(epoch, 0).micro_batches
        scored.append(micro.layout.label.size)
    assert len(set(scored)) == 1
    assert scored[0] == sum(world.catalogue.item_lengths[history].sum() for history in world.histories)


def items_of(feed: StreamFeed, histories: list[np.ndarray], epoch: int) -> list[np.ndarray]:
    """What each history's windows hold in one epoch, in the order of the windows."""
    rows = range(feed._history.size)
    return [
        np.concatenate([feed._items(row, epoch) for row in rows if feed._history[row] == number])
        for number in range(len(histories))
    ]


@pytest.mark.parametrize("shuffled", [0.25, 1.0])
def test_so_many_histories_are_shuffled_whole_others_in_every_epoch(shuffled: float, world) -> None:  # type: ignore[no-untyped-def]
    histories = [np.arange(25 + number % 10) for number in range(200)]
    lengths = np.array([history.size for history in histories])
    rows = int(windows_of(lengths, 7)[0].size)
    order = Order(rows, 16, 3)
    feed = StreamFeed(histories, world.catalogue, order, Share(1, 10**6), window_items=7, shuffled=shuffled)
    epochs = [items_of(feed, histories, epoch) for epoch in range(3)]
    for found in epochs:  # each item is still a target once
        assert all(np.array_equal(np.sort(items), history) for items, history in zip(found, histories, strict=True))
    moved = np.array([[not np.array_equal(*pair) for pair in zip(found, histories, strict=True)] for found in epochs])
    np.testing.assert_allclose(moved.mean(axis=1), shuffled, atol=0.08)
    both = np.flatnonzero(moved[0] & moved[1])
    assert both.size < 0.5 * len(histories) or shuffled == 1
    assert not any(np.array_equal(epochs[0][number], epochs[1][number]) for number in both)


def test_so_many_items_give_way_to_any_of_the_catalogue_others_in_every_epoch(world) -> None:  # type: ignore[no-untyped-def]
    histories = [np.zeros(30, dtype=np.int32) for _ in range(200)]  # a replaced item is one that is not 0
    rows = int(windows_of(np.full(200, 30), 7)[0].size)
    feed = StreamFeed(
        histories, world.catalogue, Order(rows, 16, 3), Share(1, 10**6), window_items=7, shuffled=0.5, replaced=0.2
    )
    epochs = np.array([items_of(feed, histories, epoch) for epoch in range(3)])
    others = world.catalogue.num_items - 1
    np.testing.assert_allclose((epochs != 0).mean(axis=(1, 2)), 0.2 * others / (others + 1), atol=0.02)
    assert (np.bincount(epochs[epochs != 0], minlength=others + 1)[1:] > 0).all()
    both = ((epochs[0] != 0) & (epochs[1] != 0)).mean()
    assert both < 0.06  # 0.04 where epochs know nothing of each other
    again = np.array(items_of(feed, histories, 2))
    np.testing.assert_array_equal(again, epochs[2])


def test_a_prompt_that_lists_candidates_does_not_give_the_target_away(world) -> None:  # type: ignore[no-untyped-def]
    template = find_template("instruction_candidates")
    catalogue = Catalogue.build(world.catalogue.labels, world.tokenizer, template, 400)
    targets = np.arange(24, dtype=np.int64)
    feed = ExampleFeed(world.histories, targets, catalogue, ORDER, Share(1, 10**6))
    for row in range(24):
        first, second = feed._shown(row, 0), feed._shown(row, 1)
        assert len(set(first.tolist())) == len(first) == 20
        assert (first == row).sum() == (second == row).sum() == 1
        assert set(first.tolist()) != set(second.tolist())
        np.testing.assert_array_equal(first, feed._shown(row, 0))
    (micro,) = feed.unit(0, 0).micro_batches
    lengths = [
        catalogue.prompt_length(world.histories[row], feed._shown(row, 0)) + catalogue.item_lengths[row] - 1
        for row in rows_of_step(ORDER, 0).tolist()
    ]
    assert (micro.layout.segment >= 0).sum() == sum(lengths)


Feeds = dict[str, Callable[[int, Share], AlignFeed | StreamFeed | ExampleFeed]]


@pytest.fixture(scope="module")
def feeds(world) -> Feeds:  # type: ignore[no-untyped-def]
    """Every feed, by global batch and cut."""
    shown = find_template("instruction_candidates")
    catalogue = Catalogue.build(world.catalogue.labels, world.tokenizer, shown, 400)
    lengths = np.array([history.size for history in world.histories])
    windows = int(windows_of(lengths, 3)[0].size)

    def align(batch: int, share: Share) -> AlignFeed:
        order = Order(24, batch, 5, window_rows=7)
        return AlignFeed(world.shards, world.catalogue, world.item_vectors, order, share, Objective(), num_negatives=3)

    def stream(batch: int, share: Share) -> StreamFeed:
        return StreamFeed(world.histories, world.catalogue, Order(windows, batch, 5), share, window_items=3)

    def shuffled(batch: int, share: Share) -> StreamFeed:
        order = Order(windows, batch, 5)
        return StreamFeed(world.histories, world.catalogue, order, share, window_items=3, shuffled=0.5)

    def example(batch: int, share: Share) -> ExampleFeed:
        return ExampleFeed(world.histories, np.arange(24), catalogue, Order(24, batch, 5), share)

    return {"align": align, "stream": stream, "shuffled": shuffled, "example": example}


def contents(units: list[Unit]) -> dict[int, list[ndarray]]:
    """For each place of the global batch what the model is given for it: tokens, and what they are scored as."""
    found: dict[int, list[ndarray]] = {}
    for unit in units:
        for micro in unit.micro_batches:
            layout = micro.layout
            for number, place in enumerate(micro.places.tolist()):
                assert place not in found
                inside = layout.segment == number
                scored = inside.ravel()[layout.source]
                found[place] = [
                    layout.tokens[inside],
                    layout.positions[inside],
                    layout.branch[inside],
                    layout.label[scored],
                    np.array(unit.arrays["reference"][place] if "reference" in unit.arrays else 0.0),
                ]
    return found


def draws(
    feed: AlignFeed | StreamFeed | ExampleFeed, batch: int, step: int, world: int
) -> dict[tuple[int, int], bytes]:
    """The same by (epoch, row)."""
    units = [feed.unit(step, rank) for rank in range(world)]
    rows = units[0].rows
    of_epoch = feed._order.num_rows
    return {
        ((step * batch + place) // of_epoch, rows[place]): b"".join(array.tobytes() for array in arrays)
        for place, arrays in contents(units).items()
    }


@pytest.mark.parametrize("kind", ["align", "stream", "shuffled", "example"])
@settings(max_examples=30)
@given(
    worlds=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    batches=st.tuples(st.integers(1, 9), st.integers(1, 30)),
    cut=st.tuples(st.integers(30, 400), st.integers(1, 4)),
    position=st.integers(0, 120),
)
def test_what_is_drawn_for_a_row_follows_from_seed_epoch_and_row(
    feeds: Feeds,
    kind: str,
    worlds: tuple[int, int],
    batches: tuple[int, int],
    cut: tuple[int, int],
    position: int,
) -> None:
    # Two runs that cut the data differently and are resumed where they like meet the same row in the same epoch.
    one, other = (
        draws(feeds[kind](batch, share), batch, position // batch, share.world_size)
        for batch, share in zip(batches, (Share(worlds[0], *cut), Share(worlds[1], 10**6)), strict=True)
    )
    assert len(one) == batches[0]
    assert one.keys() & other.keys()
    for key in one.keys() & other.keys():
        assert one[key] == other[key]


@pytest.mark.parametrize("kind", ["stream", "shuffled", "example"])
def test_another_epoch_draws_anew(feeds: Feeds, kind: str) -> None:
    feed = feeds[kind](1, Share(1, 10**6))
    seen: dict[int, set[bytes]] = {}
    for step in range(3 * feed._order.num_rows):
        for (_, row), what in draws(feed, 1, step, 1).items():
            seen.setdefault(row, set()).add(what)
    assert max(len(each) for each in seen.values()) > 1


@pytest.mark.parametrize("name", ["usable", "confidence"])
def test_not_one_bit_of_a_borrowers_part_depends_on_its_company(world, name: str) -> None:  # type: ignore[no-untyped-def]
    # A percentile among a sample: where a matrix product rounds by how many rows it has, a tie breaks.
    order = Order(24, 24, 5)
    found = []
    for share in (Share(1, 10**6), Share(2, 10**6), Share(3, 10**6), Share(5, 90), Share(24, 10**6)):
        feed = AlignFeed(world.shards, world.catalogue, world.item_vectors, order, share, Objective(), num_negatives=4)
        found.append(whole(feed, share.world_size, name))
    for other in found[1:]:
        np.testing.assert_array_equal(other, found[0])


def test_what_is_done_to_a_unit_does_not_reach_the_next(world) -> None:  # type: ignore[no-untyped-def]
    feed = align_feed(world, Share(2, 10**6))
    first = feed.unit(0, 0)
    expected = {name: array.copy() for name, array in first.arrays.items()}
    for array in first.arrays.values():
        array[...] = 0
    again = feed.unit(0, 0)
    for name, array in again.arrays.items():
        np.testing.assert_array_equal(array, expected[name])


@pytest.mark.parametrize("margin", ["per_negative", "batch"])
def test_borrowing_worked_out_in_chunks_is_the_same_and_takes_less(  # type: ignore[no-untyped-def]
    world, monkeypatch: pytest.MonkeyPatch, margin: str
) -> None:
    order = Order(24, 240, 5)  # rows meet themselves again: the size is what matters
    found, peaks = [], []
    for size in (240 * 3 * 10, 2**22):
        monkeypatch.setattr(sharing, "ELEMENTS_AT_ONCE", size)
        feed = AlignFeed(
            world.shards,
            world.catalogue,
            world.item_vectors,
            order,
            Share(1, 10**6),
            Objective(margin=margin),
            num_negatives=3,
        )
        examples = world.shards.take(rows_of_step(order, 0))
        items, mine = examples.items[:, :4], np.arange(240)
        feed._borrowing(examples, items, mine)
        tracemalloc.start()
        found.append(feed._borrowing(examples, items, mine))
        peaks.append(tracemalloc.get_traced_memory()[1] - sum(array.nbytes for array in found[-1].values()))
        tracemalloc.stop()
    chunked, whole = found
    np.testing.assert_array_equal(chunked["usable"], whole["usable"])
    np.testing.assert_array_equal(chunked["confidence"], whole["confidence"])
    np.testing.assert_allclose(chunked["liking_sum"], whole["liking_sum"], rtol=1e-12)
    assert peaks[0] < peaks[1] / 2


def test_more_sharing_than_a_unit_may_hold_is_refused(world, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    align_feed(world, Share(1, 10**6))
    monkeypatch.setattr(feeding, "MOST_BORROWED", 5 * 4 * 8 * 3)
    align_feed(world, Share(2, 10**6))
    with pytest.raises(ConfigError, match="8 users with 3 negatives over 1 ranks.*more workers, a smaller"):
        align_feed(world, Share(1, 10**6))
