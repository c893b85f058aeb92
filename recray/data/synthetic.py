"""Interaction logs with known truth, in the very form that users' own logs have.

The world: genres hold *shelves* of about twenty items, a shelf holds *series* of one to four volumes, and titles say
so ("The Silent Harbor", "The Silent Harbor II": a noun of the genre, an adjective of the shelf). A user has a taste:
a few shelves, most of them of two favourite genres. It drifts: now and then one shelf gives way to another, of any
genre. Users come in sessions, each on one shelf of the taste of that day; within it they often go on with the next
volume of what they just had, else they take what is popular on the shelf, and sometimes whatever is popular anywhere.

The truth: the probability that a user likes an item is the item's quality where its shelf belongs to the user's last
taste, and little elsewhere. `truth.parquet` lists the items liked with at least even chance that the user never met:
the *known false negatives*.

Axes: U users of a chunk, S shelves, W places on a shelf, G genres.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.random import Generator
from numpy.typing import NDArray

from recray.config import Synthetic
from recray.errors import DataError

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

MEAN_INTERACTIONS = 50  # a user
FEWEST_INTERACTIONS, MOST_INTERACTIONS = 6, 400
SHELF_ITEMS = 20
TASTE_SHELVES = 5
FAVOURITE_SHARE = 0.8  # of taste shelves, of the two favourite genres
SESSION_ITEMS = 5.0
NEXT_VOLUME, ANYTHING_POPULAR = 0.55, 0.1
LIKED = 0.5
START_S, SPAN_S = 1_640_995_200, 2 * 365 * 86_400  # 2022 and 2023
CHUNK_CELLS = 32_000_000  # users x items of one chunk: bounds the memory

ADJECTIVES = (  # noqa: SIM905
    "Silent Hidden Golden Broken Distant Burning Frozen Crimson Hollow Gentle Restless Forgotten Velvet "
    "Wandering Iron Paper Electric Midnight Scarlet Empty Secret Winter Summer Lonely Painted Shattered "
    "Quiet Savage Tender Bitter Emerald Faded Glass Haunted Invisible Jagged Kindred Last Marble Narrow "
    "Ordinary Patient Rising Stolen Tangled Unspoken Vanishing Weathered Yellow Amber Blind Clever Dusty "
    "Eternal Fearless Grey Humble Idle Jaded Kind"
).split()
NOUNS = (  # noqa: SIM905
    "Harbor Tide Lighthouse Sailor Current Island Voyage Anchor Shore Storm Planet Orbit Signal Machine "
    "Colony Comet Engine Android Frontier Star Sword Kingdom Dragon Tower Oath Crown Raven Forest Quest "
    "Spell Detective Alibi Witness Cipher Motive Verdict Clue Shadow Informer Case Wedding Letter Kiss "
    "Promise Dance Heart Summerhouse Garden Stranger Melody Ghost Cellar Mirror Whisper Grave Curse Attic "
    "Scream Fog Doll Soldier Trench Bridge General Front Convoy Flag Retreat Bugle Truce Ranch Sheriff "
    "Canyon Saddle Outlaw Prairie Rider Sundown Mesa Trail Joke Neighbor Uncle Holiday Mishap Roommate "
    "Parade Clown Party Banquet Goal Racer Coach Season Champion Marathon Ring Rookie Match Team River "
    "Mountain Glacier Wolf Desert Meadow Reef Eagle Jungle Valley Senator Trial Scandal Ballot Spy Treaty "
    "Embassy Leak Court Summit"
).split()
PLACES = (  # noqa: SIM905
    "Avalon Bergamo Cordoba Delphi Elba Florence Geneva Havana Ithaca Jaipur Kyoto Lisbon Madras Naples "
    "Odessa Palermo Quebec Riga Samara Trieste Utrecht Verona Warsaw Xanthi York Zagreb"
).split()
GENRES = [
    "Seafaring",
    "Science Fiction",
    "Fantasy",
    "Mystery",
    "Romance",
    "Horror",
    "War",
    "Western",
    "Comedy",
    "Sport",
    "Nature",
    "Politics",
]
VOLUMES = ("", " II", " III", " IV")


class World(NamedTuple):
    """The catalogue and its truth; items are numbered shelf by shelf and volume by volume."""

    titles: list[str]
    genre: Ints  # of an item
    shelf: Ints  # of an item
    has_next: NDArray[np.bool_]  # whether item + 1 is the next volume
    quality: Floats  # of an item: the chance that somebody with the taste likes it
    popular: Floats  # cumulative popularity over all items, ends at 1
    on_shelf: Ints  # [S, W] items, padded with the last
    weight_on_shelf: Floats  # [S, W] popularity, padded with 0
    shelf_genre: Ints  # [S]
    shelf_weight: Floats  # [S] popularity
    item_id: Ints  # of an item: a shuffle, so that numbers carry nothing


class Visits(NamedTuple):
    """What a chunk of users did, one entry an interaction, and what they would still like."""

    user: Ints
    item: Ints
    time: Ints
    liked: NDArray[np.bool_]
    liked_unmet: NDArray[np.bool_]  # [U, items]


def generate(folder: Path, synthetic: Synthetic, seed: int) -> None:
    """Write `interactions.parquet`, `items.parquet` and `truth.parquet` into a folder.

    Exactly `synthetic.interactions` interactions are written, unless users have met all they can.

    Raises:
        DataError: if more items or genres are asked for than titles can tell apart.
    """
    num_users = synthetic.users or max(8, synthetic.interactions // MEAN_INTERACTIONS)
    num_items = synthetic.items or int(np.clip(round(4.0 * synthetic.interactions**0.5), 200, 20_000))
    world = make_world(num_items, synthetic, np.random.default_rng([seed, 0]))
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(_items_table(world, synthetic.genres), folder / "items.parquet", compression="zstd")
    wanted = _interactions_a_user(synthetic.interactions, num_users, num_items, np.random.default_rng([seed, 1]))
    size = max(64, CHUNK_CELLS // num_items)
    log_schema = pa.schema(
        [("user_id", pa.string()), ("item_id", pa.int64()), ("timestamp", pa.int64()), ("rating", pa.float32())]
    )
    truth_schema = pa.schema([("user_id", pa.string()), ("liked", pa.list_(pa.int64()))])
    with (
        pq.ParquetWriter(folder / "interactions.parquet", log_schema, compression="zstd") as log,
        pq.ParquetWriter(folder / "truth.parquet", truth_schema, compression="zstd") as truth,
    ):
        for chunk, first in enumerate(range(0, num_users, size)):
            generator = np.random.default_rng([seed, 2, chunk])
            visits = visit(world, wanted[first : first + size], synthetic, generator)
            log.write_table(_log_table(world, visits, first, generator, log_schema))
            truth.write_table(_truth_table(world, visits, first, truth_schema))


def make_world(num_items: int, synthetic: Synthetic, generator: Generator) -> World:
    """Return a catalogue with its genres, shelves, series, titles, popularity and quality."""
    num_genres = min(synthetic.genres, num_items)
    genre = np.arange(num_items) * num_genres // num_items
    first = np.searchsorted(genre, np.arange(num_genres))
    within = np.arange(num_items) - first[genre]
    starts = np.concatenate([[0], np.cumsum(np.bincount(genre)[:-1] // SHELF_ITEMS + 1)])
    shelf = starts[genre] + within // SHELF_ITEMS
    shelf = np.unique(shelf, return_inverse=True)[1].astype(np.int64)
    volume = _volumes(shelf, generator)
    has_next = np.append(volume[1:] == volume[:-1] + 1, False) & np.append(shelf[1:] == shelf[:-1], False)
    ranks = generator.permutation(num_items).astype(np.float64) + 1.0
    weight: Floats = ranks ** -float(synthetic.popularity_exponent)
    on_shelf, weight_on_shelf = _shelves(shelf, weight)
    return World(
        titles=_titles(genre, shelf, volume, generator),
        genre=genre,
        shelf=shelf,
        has_next=has_next,
        quality=generator.beta(4.0, 2.0, num_items),
        popular=np.cumsum(weight) / weight.sum(),
        on_shelf=on_shelf,
        weight_on_shelf=weight_on_shelf,
        shelf_genre=genre[on_shelf[:, 0]],
        shelf_weight=np.bincount(shelf, weights=weight).astype(np.float64),
        item_id=generator.permutation(num_items) + 1,
    )


def visit(world: World, wanted: Ints, synthetic: Synthetic, generator: Generator) -> Visits:
    """Let a chunk of users go through their sessions, one interaction of every user at a time.

    Args:
        wanted: interactions of each user; fewer come out where a user has met all they could.
    """
    num_users, num_items = len(wanted), len(world.titles)
    taste, weight = _tastes(world, num_users, generator)
    start, length = _calendars(num_users, generator)
    pace = length / np.maximum(1.0, wanted / SESSION_ITEMS)
    met = np.zeros((num_users, num_items), dtype=bool)
    last = np.full(num_users, -1)
    shelf = np.zeros(num_users, dtype=np.int64)
    clock = start.copy()
    users, items, times, liked = [], [], [], []
    for step in range(int(wanted.max(initial=0))):
        active = np.flatnonzero(wanted > step)
        fresh = active[(last[active] < 0) | (generator.random(len(active)) < 1.0 / SESSION_ITEMS)]
        drifting = fresh[generator.random(len(fresh)) < synthetic.taste_drift]
        _drift(world, taste, drifting, generator)
        chosen = (generator.random((len(fresh), 1)) > np.cumsum(weight[fresh], axis=1)).sum(axis=1)
        shelf[fresh] = taste[fresh, np.minimum(chosen, TASTE_SHELVES - 1)]
        clock[active] += generator.integers(60, 1800, len(active))
        clock[fresh] += (pace[fresh] * generator.exponential(1.0, len(fresh))).astype(np.int64)
        last[fresh] = -1
        item = _next_items(world, met[active], last[active], shelf[active], generator)
        found = item >= 0
        who, what = active[found], item[found]
        met[who, what] = True
        last[who] = what
        chance = np.where((taste[who] == world.shelf[what][:, None]).any(axis=1), world.quality[what], 0.2)
        users.append(who)
        items.append(what)
        times.append(clock[who].copy())
        liked.append(generator.random(len(who)) < chance)
    # Who ran past the end of their stay lived faster, in the same order.
    speed = np.minimum(1.0, length / np.maximum(1, clock - start))
    user, time = np.concatenate(users), np.concatenate(times)
    time = start[user] + ((time - start[user]) * speed[user]).astype(np.int64)
    return Visits(user, np.concatenate(items), time, np.concatenate(liked), _liked_unmet(world, taste, met))


def _liked_unmet(world: World, taste: Ints, met: NDArray[np.bool_]) -> NDArray[np.bool_]:
    on_taste = np.zeros((len(taste), len(world.shelf_genre)), dtype=bool)
    on_taste[np.arange(len(taste))[:, None], taste] = True
    result: NDArray[np.bool_] = on_taste[:, world.shelf] & (world.quality >= LIKED) & ~met
    return result


def _next_items(world: World, met: NDArray[np.bool_], last: Ints, shelf: Ints, generator: Generator) -> Ints:
    """Return an item that each user has not met: the next volume, something of the shelf, or something popular."""
    rows = np.arange(len(last))
    item = _from_shelf(world, met, shelf, generator)
    follows = (last >= 0) & world.has_next[last] & (generator.random(len(last)) < NEXT_VOLUME)
    follows &= ~met[rows, np.minimum(last + 1, met.shape[1] - 1)]
    item[follows] = last[follows] + 1
    anything = ~follows & (generator.random(len(last)) < ANYTHING_POPULAR)
    item[anything] = -1
    for _ in range(4):
        missing = np.flatnonzero(item < 0)
        drawn = _from_all(world, len(missing), generator)
        unmet = ~met[missing, drawn]
        item[missing[unmet]] = drawn[unmet]
    for row in np.flatnonzero(item < 0):  # few: has met nearly all that is popular
        left = np.flatnonzero(~met[row])
        if len(left):
            item[row] = generator.choice(left)
    return item


def _from_shelf(world: World, met: NDArray[np.bool_], shelf: Ints, generator: Generator) -> Ints:
    """Return an unmet item of each user's shelf, popular ones more often; -1 where there is none left."""
    items = world.on_shelf[shelf]
    weight = np.where(met[np.arange(len(shelf))[:, None], items], 0.0, world.weight_on_shelf[shelf])
    cumulative = np.cumsum(weight, axis=1)
    place = (cumulative <= generator.random((len(shelf), 1)) * cumulative[:, -1:]).sum(axis=1)
    place = np.minimum(place, items.shape[1] - 1)
    chosen: Ints = np.where(cumulative[:, -1] > 0, items[np.arange(len(shelf)), place], -1)
    return chosen


def _from_all(world: World, count: int, generator: Generator) -> Ints:
    drawn = np.searchsorted(world.popular, generator.random(count), side="right")
    return np.minimum(drawn, len(world.popular) - 1)


def _tastes(world: World, num_users: int, generator: Generator) -> tuple[Ints, Floats]:
    """Return the shelves of each user [U, TASTE_SHELVES] and how often each is chosen."""
    genre_weight = np.bincount(world.shelf_genre, weights=world.shelf_weight)
    favourites = generator.choice(len(genre_weight), size=(num_users, 2), p=genre_weight / genre_weight.sum())
    taste = np.stack([_a_shelf(world, favourites, generator) for _ in range(TASTE_SHELVES)], axis=1)
    return taste, generator.dirichlet(np.full(TASTE_SHELVES, 1.5), num_users)


def _a_shelf(world: World, favourites: Ints, generator: Generator) -> Ints:
    """Return one shelf a user: of one of two favourite genres, or of any."""
    cumulative = np.concatenate([[0.0], np.cumsum(world.shelf_weight)])
    genre = favourites[np.arange(len(favourites)), generator.integers(0, 2, len(favourites))]
    first = np.searchsorted(world.shelf_genre, genre)
    after = np.searchsorted(world.shelf_genre, genre, side="right")
    anywhere = generator.random(len(genre)) >= FAVOURITE_SHARE
    first, after = np.where(anywhere, 0, first), np.where(anywhere, len(world.shelf_genre), after)
    point = cumulative[first] + generator.random(len(genre)) * (cumulative[after] - cumulative[first])
    shelves: Ints = np.clip(np.searchsorted(cumulative, point, side="right") - 1, first, after - 1)
    return shelves


def _drift(world: World, taste: Ints, users: Ints, generator: Generator) -> None:
    """Replace one shelf of each of these users, in place, by one of any genre, popular ones more often."""
    place = generator.integers(0, TASTE_SHELVES, len(users))
    weight = world.shelf_weight / world.shelf_weight.sum()
    taste[users, place] = generator.choice(len(weight), size=len(users), p=weight)


def _calendars(num_users: int, generator: Generator) -> tuple[Ints, Ints]:
    """Return when each user starts and how many seconds they stay, all within the span."""
    start = generator.random(num_users) * 0.85
    length = (1.0 - start) * (0.3 + 0.7 * generator.random(num_users))
    return (START_S + start * SPAN_S).astype(np.int64), (length * SPAN_S).astype(np.int64)


def _interactions_a_user(total: int, num_users: int, num_items: int, generator: Generator) -> Ints:
    """Return how much each user does: many a little, a few a lot, `total` together where that is possible."""
    most = min(num_items, max(MOST_INTERACTIONS, 4 * total // num_users))
    share = generator.lognormal(0.0, 0.8, num_users)
    counts: Ints = np.clip(share / share.sum() * total, min(FEWEST_INTERACTIONS, most), most).astype(np.int64)
    for _ in range(64):
        missing = total - int(counts.sum())
        open_users = np.flatnonzero(counts < most if missing > 0 else counts > 1)
        if missing == 0 or len(open_users) == 0:
            break
        chosen = generator.permutation(open_users)[: abs(missing)]
        counts[chosen] += np.sign(missing)
    return counts


def _volumes(shelf: Ints, generator: Generator) -> Ints:
    """Return the volume of each item in its series, from 0; a series never leaves its shelf."""
    begins = generator.random(len(shelf)) < 0.3
    begins |= np.append(True, shelf[1:] != shelf[:-1])
    place = np.arange(len(shelf))
    volume: Ints = (place - np.maximum.accumulate(np.where(begins, place, 0))) % len(VOLUMES)
    return volume


def _shelves(shelf: Ints, weight: Floats) -> tuple[Ints, Floats]:
    sizes = np.bincount(shelf)
    first = np.cumsum(sizes) - sizes
    places = np.minimum(np.arange(sizes.max())[None, :], sizes[:, None] - 1)
    on_shelf = first[:, None] + places
    real = np.arange(sizes.max())[None, :] < sizes[:, None]
    return on_shelf, np.where(real, weight[on_shelf], 0.0)


def _titles(genre: Ints, shelf: Ints, volume: Ints, generator: Generator) -> list[str]:
    """Return distinct titles: genres have nouns of their own, shelves of a genre lean on one adjective."""
    num_genres = int(genre.max()) + 1
    per_genre = len(NOUNS) // min(num_genres, len(NOUNS))
    adjectives = np.stack([generator.permutation(len(ADJECTIVES)) for _ in range(num_genres)])
    series_begins = volume == 0
    of_genre_begins = np.append(True, genre[1:] != genre[:-1])
    series = np.cumsum(series_begins) - 1
    number = series - series[np.flatnonzero(of_genre_begins)][genre]
    number += genre // (len(NOUNS) // per_genre) * (per_genre * len(ADJECTIVES))  # genres beyond the nouns share them
    place = number // (per_genre * len(ADJECTIVES))
    if int(place.max()) > len(PLACES):
        raise DataError(
            f"ingest.synthetic: {len(genre):,} items in {num_genres} genres are more than titles can tell apart; "
            "lower ingest.synthetic.items or genres"
        )
    noun = genre % (len(NOUNS) // per_genre) * per_genre + number % per_genre
    adjective = adjectives[genre, number // per_genre % len(ADJECTIVES)]
    del shelf
    return [
        f"The {ADJECTIVES[a]} {NOUNS[n]}{' of ' + PLACES[p - 1] if p else ''}{VOLUMES[v]}"
        for a, n, p, v in zip(adjective.tolist(), noun.tolist(), place.tolist(), volume.tolist(), strict=True)
    ]


def _items_table(world: World, num_genres: int) -> pa.Table:
    names = [GENRES[g] if g < len(GENRES) else f"Genre {g + 1}" for g in range(num_genres)]
    order = np.argsort(world.item_id)
    return pa.table(
        {
            "item_id": pa.array(world.item_id[order]),
            "title": pa.array([world.titles[item] for item in order]),
            "genres": pa.array([[names[world.genre[item]]] for item in order], pa.list_(pa.string())),
        }
    )


def _log_table(world: World, visits: Visits, first: int, generator: Generator, schema: pa.Schema) -> pa.Table:
    order = np.lexsort([visits.time, visits.user])
    user, item, time, liked = (each[order] for each in visits[:4])
    rating = np.where(liked, generator.integers(7, 11, len(order)), generator.integers(1, 7, len(order))) / 2.0
    names = pa.array(_user_names(first, int(user.max(initial=0)) + 1)).take(pa.array(user))
    return pa.table([names, pa.array(world.item_id[item]), pa.array(time), pa.array(rating.astype(np.float32))], schema)


def _truth_table(world: World, visits: Visits, first: int, schema: pa.Schema) -> pa.Table:
    user, item = np.nonzero(visits.liked_unmet)
    num_users = len(visits.liked_unmet)
    offsets = np.searchsorted(user, np.arange(num_users + 1)).astype(np.int32)
    lists = pa.ListArray.from_arrays(pa.array(offsets), pa.array(world.item_id[item]))
    return pa.table([pa.array(_user_names(first, num_users)), lists], schema)


def _user_names(first: int, count: int) -> list[str]:
    return [f"user-{number}" for number in range(first + 1, first + count + 1)]
