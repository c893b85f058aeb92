"""Every sampler of the registry: the facts that hold for all, then the distribution that each claims."""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from recray.config import Negatives
from recray.negatives import draws, in_batch, lists, mixed, nearest, same_category, self_play, top_k_stochastic
from recray.negatives.adaptive import Scores
from recray.negatives.in_batch import batches_of
from recray.negatives.lists import Targets
from recray.negatives.registry import SAMPLERS, needs_of, prepared
from recray.negatives.self_play import Pools
from recray.train.order import Order, rows_of_step

Known = Callable[..., dict[str, Any]]
EVERY = pytest.mark.parametrize("name", sorted(SAMPLERS))
WITHOUT_CHANCE = {"adaptive", "self_play"}  # their own negatives follow from scores
WEIGHTED = {"uniform", "popularity", "inverse_popularity"}  # no list, so no fallback


def _met(members: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    flat = np.array([item for each in members for item in each], dtype=np.int32)
    return flat, np.cumsum([0, *map(len, members)])


def _world(known: Known, rows: int = 60, met: int = 12, seed: int = 0) -> tuple[dict[str, Any], list[list[int]]]:
    """Return rows that all met their target and more."""
    rng = np.random.default_rng(seed)
    members = [rng.permutation(40)[: 1 + rng.integers(met)].tolist() for _ in range(rows)]
    return known(np.array([each[0] for each in members]), seed=seed), members


def _chi_square(observed: np.ndarray, expected: np.ndarray) -> float:
    """Return how many standard deviations chi-square lies above its mean; what can't be must not be."""
    assert observed[expected == 0].sum() == 0
    kept = expected > 0
    freedom = kept.sum() - 1
    value = ((observed - expected)[kept] ** 2 / expected[kept]).sum()
    return float((value - freedom) / math.sqrt(2 * freedom))


@EVERY
def test_prefixes_exclusion_and_no_repeats(name: str, known: Known) -> None:
    facts, members = _world(known)
    sampler = prepared(name, facts)
    rows = np.arange(60)
    largest, own = sampler.draw(rows, *_met(members), num=20, seed=5)
    assert largest.dtype == np.int32
    for drawn, met in zip(largest.tolist(), members, strict=True):
        assert len(set(drawn)) == 20
        assert not set(drawn) & set(met)
        assert set(drawn) <= set(range(40))
    for num in (1, 2, 7, 19):
        smaller, of_those = sampler.draw(rows, *_met(members), num=num, seed=5)
        np.testing.assert_array_equal(smaller, largest[:, :num])
        assert (of_those <= num).all()
        assert (of_those <= own).all()


@EVERY
def test_neighbours_parts_and_memory_change_nothing(name: str, known: Known, monkeypatch: pytest.MonkeyPatch) -> None:
    facts, members = _world(known)
    sampler = prepared(name, facts)
    whole = sampler.draw(np.arange(60), *_met(members), num=9, seed=5)
    order = np.random.default_rng(1).permutation(60)
    monkeypatch.setattr(draws, "CELLS_AT_ONCE", 900)
    parts = [
        sampler.draw(at, *_met([members[row] for row in at]), num=9, seed=5)
        for at in (order[:1], order[1:24], order[24:])
    ]
    for column in range(2):
        np.testing.assert_array_equal(np.concatenate([part[column] for part in parts]), whole[column][order])


@EVERY
def test_what_a_user_met_in_parts_or_twice_is_the_same(name: str, known: Known) -> None:
    facts, members = _world(known, rows=20)
    sampler = prepared(name, facts)
    doubled = [each[::-1] + each for each in members]
    once, twice = (sampler.draw(np.arange(20), *_met(each), num=9, seed=5) for each in (members, doubled))
    np.testing.assert_array_equal(once.negatives, twice.negatives)
    np.testing.assert_array_equal(once.own, twice.own)


@EVERY
def test_another_seed_draws_others(name: str, known: Known) -> None:
    facts, members = _world(known)
    sampler = prepared(name, facts)
    one, same, other = (sampler.draw(np.arange(60), *_met(members), num=5, seed=seed).negatives for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, same)
    if name not in WITHOUT_CHANCE:
        assert (one != other).mean() > 0.2


@EVERY
def test_a_row_falls_back_when_its_own_list_ends_and_says_so(name: str, known: Known) -> None:
    facts, members = _world(known)
    own = prepared(name, facts).draw(np.arange(60), *_met(members), num=25, seed=5).own
    if name in WEIGHTED:
        assert (own == 25).all()
    else:
        assert 0 < own.sum() < 60 * 25


@EVERY
def test_too_few_items_are_refused_with_the_row(name: str, known: Known) -> None:
    facts, _ = _world(known)
    with pytest.raises(ValueError, match=r"row 7: .* are left"):
        prepared(name, facts).draw(np.array([7]), *_met([list(range(1, 37))]), num=6, seed=0)
    with pytest.raises(ValueError, match="at least one"):
        prepared(name, facts).draw(np.array([7]), *_met([[1]]), num=0, seed=0)


@EVERY
def test_what_it_was_not_told_is_asked_for(name: str) -> None:
    with pytest.raises(ValueError, match=f"sampler '{name}' needs {needs_of(name)[0]}.*; got nothing"):
        prepared(name, {})


@EVERY
def test_the_weights_are_one_an_item(name: str, known: Known) -> None:
    weights = prepared(name, _world(known)[0]).weights()
    assert weights.shape == (40,)
    assert (weights > 0).all()


def test_the_registry_and_the_settings_name_the_same() -> None:
    assert set(SAMPLERS) == set(Negatives.samplers())


def test_inverse_popularity_is_inversely_proportional() -> None:
    frequency = np.array([0, 1, 2, 4, 8, 16])
    for exponent in (1.0, 0.5):
        sampler = prepared("inverse_popularity", {"frequency": frequency, "exponent": exponent})
        found = sampler.draw(np.arange(40_000), *_met([[2]] * 40_000), num=1, seed=0).negatives[:, 0]
        weights = np.maximum(frequency, 1.0) ** -exponent
        weights[2] = 0
        assert abs(_chi_square(np.bincount(found, minlength=6), 40_000 * weights / weights.sum())) < 5


def test_batches_are_those_of_the_order() -> None:
    rows = np.arange(100, 150)
    targets = Targets(rows, np.random.default_rng(0).integers(0, 9, 50))
    batches = batches_of(targets, size=8, seed=3)
    for step in range(7):
        read = rows_of_step(Order(50, 8, 3), step)
        np.testing.assert_array_equal(batches.targets[step], targets.items[read])
        first_epoch = read[: 50 - 8 * step]  # the last step goes on with rows of the second
        assert (batches.batch[first_epoch] == step).all()
    np.testing.assert_array_equal(batches.of(np.array([117])), batches.targets[batches.batch[[17]]])


def test_in_batch_draws_by_number_in_the_batch() -> None:
    """20,000 batches alike: 1 row each of target 0, 2 of 1, 3 of 2, 4 of 3, and 6 of the row's own."""
    count, own = 20_000, [0] + [1] * 2 + [2] * 3 + [3] * 4 + [4] * 6
    batches = in_batch.Batches(np.arange(count), np.zeros(count, dtype=int), np.array([own]))
    frequency = np.array([1, 2, 3, 4, 6, 50])  # 5 is in no batch
    sampler = prepared("in_batch", {"batches": batches, "target_frequency": frequency})
    found, of_batch = sampler.draw(np.arange(count), *_met([[4]] * count), num=5, seed=0)
    weights = np.array([1.0, 2, 3, 4, 0, 0])
    first = weights / weights.sum()
    assert abs(_chi_square(np.bincount(found[:, 0], minlength=6), count * first)) < 5
    second = sum(first[i] * np.where(np.arange(6) == i, 0, weights) / (10 - weights[i]) for i in range(4))
    assert abs(_chi_square(np.bincount(found[:, 1], minlength=6), count * second)) < 5
    assert (of_batch == 4).all()
    assert (found[:, 4] == 5).all()


def test_the_fallback_draws_by_its_weights() -> None:
    count = 20_000
    batches = in_batch.Batches(np.arange(count), np.zeros(count, dtype=int), np.array([[0, 1]]))
    frequency = np.array([9, 9, 1, 2, 3, 4])
    found, own = in_batch.draw(
        np.arange(count), *_met([[0, 3]] * count), num=2, batches=batches, target_frequency=frequency, seed=0
    )
    assert (own == 1).all()
    assert (found[:, 0] == 1).all()
    wanted = np.array([0, 0, 1, 0, 3, 4]) / 8
    assert abs(_chi_square(np.bincount(found[:, 1], minlength=6), count * wanted)) < 5


@pytest.mark.parametrize(("share", "places"), [(0.5, "0101010101"), (0.3, "0001001001"), (0.8, "0111101111")])
def test_places_are_shared_out_in_every_prefix(share: float, places: str) -> None:
    found = mixed.uniform_places(10, share)
    assert "".join(map(str, found.astype(int))) == places
    for n in range(1, 11):
        assert found[:n].sum() == math.floor(n * share + 1e-9)


def test_mixed_is_in_batch_and_uniform_in_turn(known: Known) -> None:
    """In plain loops: the next item of its kind that is not there yet."""
    facts, members = _world(known)
    told = {key: facts[key] for key in ("batches", "target_frequency")}
    rows, met = np.arange(60), _met(members)
    found, own = mixed.draw(rows, *met, num=12, uniform_share=0.4, seed=5, **told)
    popular = in_batch.draw(rows, *met, num=12, seed=5, **told)
    anything = prepared("uniform", facts).draw(rows, *met, num=12, seed=draws.another_seed(5, 2)).negatives
    for row in rows:
        chosen: list[int] = []
        of_batch = 0
        for is_uniform in mixed.uniform_places(12, 0.4):
            source = (anything if is_uniform else popular.negatives)[row].tolist()
            item = next(item for item in source if item not in chosen)
            of_batch += bool(is_uniform) or source.index(item) < popular.own[row]
            chosen.append(item)
        assert found[row].tolist() == chosen
        assert own[row] == of_batch


@pytest.mark.parametrize("name", ["adaptive", "adaptive_mixed"])
def test_adaptive_keeps_the_highest_scores(name: str, known: Known) -> None:
    facts, members = _world(known)
    found, own = prepared(name, facts).draw(np.arange(60), *_met(members), num=4, seed=5)
    scores: Scores = facts["scores"]
    anything = prepared("uniform", facts).draw(np.arange(60), *_met(members), num=6, seed=draws.another_seed(5, 2))
    for row in range(60):
        listed = set(facts["batches"].of(np.array([row]))[0].tolist())
        if name == "adaptive_mixed":
            listed |= set(anything.negatives[row].tolist())
        by_score = scores.items @ scores.users[row]
        wanted = sorted(listed - set(members[row]), key=lambda item: -by_score[item])[:4]
        assert own[row] == len(wanted)
        assert found[row, : len(wanted)].tolist() == wanted


def test_adaptive_mixed_reaches_beyond_the_batch(known: Known) -> None:
    facts, members = _world(known)
    found = prepared("adaptive_mixed", facts).draw(np.arange(60), *_met(members), num=4, seed=5).negatives
    inside = [(item in facts["batches"].of(np.array([row]))[0]) for row in range(60) for item in found[row]]
    assert 0.05 < np.mean(inside) < 0.95


def test_a_catalogue_without_genres_has_no_sets_of_them() -> None:
    nothing = np.zeros(0, dtype=np.int64)
    found = same_category.genres_of(nothing, nothing, 3)
    assert found.sets == []
    assert found.set_of_item.tolist() == [-1, -1, -1]
    named = same_category.genres_of_items(pa.array([["Drama"], None, ["Noir", "Drama", "Drama"]]))
    assert [named.sets[which] if which >= 0 else () for which in named.set_of_item] == [(0,), (), (0, 1)]


def test_same_category_is_uniform_among_items_that_share_a_genre() -> None:
    """Genres a: 0 1 2 3; b: 3 4 5; c: 6 7; 8 has none."""
    pairs = [(0, 0), (1, 0), (2, 0), (3, 0), (3, 1), (4, 1), (5, 1), (6, 2), (7, 2)]
    genres = same_category.genres_of(np.array([p[0] for p in pairs]), np.array([p[1] for p in pairs]), 9)
    assert genres.sharing(int(genres.set_of_item[3])).tolist() == [0, 1, 2, 3, 4, 5]
    count = 20_000
    targets = Targets(np.arange(4 * count), np.repeat([3, 0, 6, 8], count))
    met = _met([[item] if item != 3 else [3, 1] for item in targets.items.tolist()])
    found, own = same_category.draw(np.arange(4 * count), *met, num=2, targets=targets, genres=genres, seed=0)
    for place, (shared, left) in enumerate([([0, 2, 4, 5], 2), ([1, 2, 3], 2), ([7], 1), ([], 0)]):
        part = slice(place * count, (place + 1) * count)
        assert (own[part] == left).all()
        if shared:
            wanted = np.isin(np.arange(9), shared) * count / len(shared)
            assert abs(_chi_square(np.bincount(found[part, 0], minlength=9), wanted)) < 5 if len(shared) > 1 else True
            assert set(found[part, 0].tolist()) == set(shared)
    nothing = found[3 * count :, 0]  # the target has no genre: any other item
    assert abs(_chi_square(np.bincount(nothing, minlength=9), np.where(np.arange(9) == 8, 0, count / 8))) < 5


def test_neighbours_in_plain_loops(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = np.random.default_rng(0).normal(size=(30, 5)).astype(np.float32)
    vectors[7] = 0  # never trained
    units = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    cosines = units @ units.T
    wanted = [sorted(set(range(30)) - {item}, key=lambda o: (-cosines[item, o], o))[2:9] for item in range(30)]
    assert nearest.neighbours(vectors, first_rank=3, last_rank=9).tolist() == wanted
    monkeypatch.setattr(nearest, "PAIRS_AT_ONCE", 100)
    assert nearest.neighbours(vectors, first_rank=3, last_rank=9).tolist() == wanted
    assert nearest.neighbours(vectors, first_rank=3, last_rank=500).shape == (30, 27)
    with pytest.raises(ValueError, match="no neighbours of ranks 30 to 29"):
        nearest.neighbours(vectors, first_rank=30, last_rank=40)


def test_nearest_is_uniform_in_the_window() -> None:
    vectors = np.random.default_rng(0).normal(size=(30, 5)).astype(np.float32)
    near = nearest.neighbours(vectors, first_rank=3, last_rank=9)
    count = 20_000
    targets = Targets(np.arange(count), np.full(count, 4))
    met = [4, int(near[4, 2]), int(near[4, 5])]
    found, own = nearest.draw(np.arange(count), *_met([met] * count), num=6, targets=targets, near=near, seed=0)
    wanted = np.isin(np.arange(30), np.setdiff1d(near[4], met)) * count / 5
    for column in found.T[:5]:
        assert abs(_chi_square(np.bincount(column, minlength=30), wanted)) < 5
    assert (own == 5).all()


def test_self_play_takes_the_best_of_the_pool(known: Known) -> None:
    facts, members = _world(known)
    pools: Pools = facts["pools"]
    found, own = prepared("self_play", facts).draw(np.arange(60), *_met(members), num=9, seed=5)
    for row in range(60):
        wanted = [item for item in pools.items[row].tolist() if item not in members[row]][:9]
        assert found[row].tolist() == wanted
    assert (own == 9).all()


def test_ranked_is_by_score_and_stable() -> None:
    items = np.array([[5, 6, 7, 8], [1, 2, 3, 4]])
    scores = np.array([[0.0, 2.0, 1.0, 2.0], [-1.0, -1.0, -3.0, 0.0]])
    assert self_play.ranked(items, scores).tolist() == [[6, 8, 7, 5], [4, 1, 2, 3]]


def test_top_k_is_uniform_among_the_best_and_anew_in_every_epoch() -> None:
    count, pool = 20_000, np.array([7, 3, 9, 1, 5, 0, 2])
    pools = Pools(np.arange(count), np.broadcast_to(pool, (count, 7)), 10)
    told = {"pools": pools, "top_k": 5, "seed": 0}
    rows, met = np.arange(count), _met([[9]] * count)
    first, second = (top_k_stochastic.draw(rows, *met, num=2, epoch=epoch, **told) for epoch in (0, 1))
    wanted = np.isin(np.arange(10), [7, 3, 1, 5]) * count / 4
    pairs = Counter(zip(first.negatives[:, 0].tolist(), second.negatives[:, 0].tolist(), strict=True))
    for drawn in (first, second):
        for column in drawn.negatives.T:
            assert abs(_chi_square(np.bincount(column, minlength=10), wanted)) < 5
    observed = np.array([pairs[a, b] for a in (7, 3, 1, 5) for b in (7, 3, 1, 5)])
    assert abs(_chi_square(observed, np.full(16, count / 16))) < 5
    again = top_k_stochastic.draw(rows, *met, num=2, epoch=1, **told)
    np.testing.assert_array_equal(again.negatives, second.negatives)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: lists.places(np.array([3, 5]), np.array([3, 4, 9])), r"2 rows are not among the 2 known .* row 4"),
        (lambda: batches_of(Targets(np.arange(3), np.arange(3)), size=1, seed=0), "at least two rows, got 1"),
        (
            lambda: mixed.draw(
                np.array([0]),
                *_met([[0]]),
                num=1,
                batches=in_batch.Batches(np.array([0]), np.array([0]), np.array([[0, 1]])),
                target_frequency=np.array([1, 1]),
                uniform_share=1.0,
                seed=0,
            ),
            "between 0 and 1, got 1.0",
        ),
        (
            lambda: top_k_stochastic.draw(
                np.array([0]),
                *_met([[0]]),
                num=3,
                pools=Pools(np.array([0]), np.array([[1, 2, 3, 4]]), 9),
                top_k=5,
                seed=0,
            ),
            "pools have 4 items, so the best 5 of them",
        ),
    ],
)
def test_what_can_not_be_done_is_refused(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
