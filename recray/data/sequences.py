"""Histories, splits and evaluation candidates: pure functions on Arrow tables, no Python call a user.

A user's interactions stand in order of (time, tie_break), item after item; "place" is a place in that order, from 0.
In every split the training interactions of a user are the first `train_length` of them, so training never sees
anything later than what is held out of the same user.

Axes: U users of a table, N their interactions end to end, R evaluation rows, C candidates.
"""

from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from recray.data.hashing import Hash, hash_strings, mix
from recray.data.logs import distinct
from recray.schema import ITEMS

Ints = NDArray[np.int64]

# One user a row, in order of user_id: the whole log of each.
USERS = pa.schema([("user_id", pa.string()), ("items", ITEMS), ("times", pa.list_(pa.int64()))])
# One training history a row. Examples are cut at every place from `first_target` on.
TRAINING = pa.schema([("user_id", pa.string()), ("order", pa.int64()), ("items", ITEMS), ("first_target", pa.int64())])
# Evaluation rows before they are numbered: `met` is everything of the user before the target.
TARGETS = pa.schema(
    [
        ("user_id", pa.string()),
        ("order", pa.int64()),
        ("met", ITEMS),
        ("target", pa.int32()),
        ("candidates", ITEMS),  # as published, or null
        ("draw", pa.uint64()),  # where fewer rows are wanted, those with the smallest draw are kept
    ]
)

SPLIT_NUMBERS = {"train": 0, "validation": 1, "test": 2}


class Cut(NamedTuple):
    """Where each user's log is cut."""

    train_length: Ints  # [U]
    part: NDArray[np.int8]  # [N] a number of SPLIT_NUMBERS


def users_of(interactions: pa.Table) -> pa.Table:
    """Return rows of `USERS` from rows of the interactions table that hold every user whole."""
    interactions = distinct(interactions)
    users = interactions["user_id"].combine_chunks().dictionary_encode() if interactions.num_rows else None
    if users is None:
        return USERS.empty_table()
    offsets = _offsets(np.bincount(users.indices.to_numpy(zero_copy_only=False)))
    return pa.table(
        [
            users.dictionary,
            pa.ListArray.from_arrays(pa.array(offsets), interactions["item"].combine_chunks()),
            pa.ListArray.from_arrays(pa.array(offsets), interactions["time"].combine_chunks()),
        ],
        schema=USERS,
    )


def user_lengths(rows: pa.Table) -> Ints:
    """Return how many items each row of `USERS` or `TRAINING` holds."""
    return _lengths(rows["items"])


def user_times(users: pa.Table) -> Ints:
    """Return the times of rows of `USERS`, end to end."""
    return _flat(users["times"])


def cut_last(lengths: Ints, last: int) -> Cut:
    """Hold out the last `last` interactions of each user for the test, the `last` before for validation.

    A user with fewer than 2 * last + 1 interactions trains only.
    """
    held_out = lengths >= 2 * last + 1
    from_end = np.repeat(lengths, lengths) - _places(lengths)  # 1 at the last
    part = np.where(from_end <= last, 2, np.where(from_end <= 2 * last, 1, 0)).astype(np.int8)
    part[~np.repeat(held_out, lengths)] = 0
    return Cut(np.where(held_out, lengths - 2 * last, lengths), part)


def cut_at_times(lengths: Ints, times: Ints, *, validation_from: int, test_from: int) -> Cut:
    """Hold out what happened from two moments on, the same for all users."""
    part = ((times >= validation_from).astype(np.int8) + (times >= test_from)).astype(np.int8)
    return Cut(_sum_by_user(part == 0, lengths), part)


def cut_moments(times: Ints, *, validation: float, test: float) -> tuple[int, int]:
    """Return from when on interactions are validation and test: the quantiles of all times that leave these fractions.

    Interactions of one moment fall on the same side.
    """
    ranks = [min(len(times) - 1, int(np.ceil(len(times) * (1.0 - held_out)))) for held_out in (validation + test, test)]
    ordered = np.partition(times, ranks)
    return int(ordered[ranks[0]]), int(ordered[ranks[1]])


def cut_before_targets(users: pa.Table, targets: pa.Table) -> Ints:
    """Return the train length of each user: what comes before the first of the user's published targets.

    Args:
        users: rows of `USERS`, distinct users.
        targets: user_id, target and last (the last item of the published history), one row a held-out target.
    """
    lengths = _lengths(users["items"])
    owners = pc.index_in(targets["user_id"], value_set=users["user_id"].combine_chunks())
    here = pc.is_valid(owners).to_numpy()
    owner = owners.filter(pc.is_valid(owners)).to_numpy()
    target, last = (targets[name].to_numpy()[here] for name in ("target", "last"))
    starts = _offsets(lengths)[:-1].astype(np.int64)
    row = np.repeat(np.arange(len(owner)), lengths[owner])
    place = _places(lengths[owner])
    items = _flat(users["items"])
    at = starts[owner][row] + place
    is_target = items[at] == target[row]
    follows = is_target & (place > 0) & (items[np.maximum(at - 1, 0)] == last[row])
    far = np.iinfo(np.int64).max
    exact, any_place = np.full(len(owner), far), np.full(len(owner), far)
    np.minimum.at(exact, row[follows], place[follows])
    np.minimum.at(any_place, row[is_target], place[is_target])
    found = np.where(exact < far, exact, any_place)
    train = lengths.copy()
    np.minimum.at(train, owner, found)
    return train


def training_of(users: pa.Table, train_length: Ints, *, examples_per_user: int) -> pa.Table:
    """Return rows of `TRAINING`, one a user; histories shorter than two can't teach and are left out."""
    keep = train_length >= 2
    length = train_length[keep]
    starts = _offsets(_lengths(users["items"]))[:-1].astype(np.int64)[keep]
    return pa.table(
        [
            users["user_id"].filter(pa.array(keep)),
            pa.array(np.zeros(len(length), dtype=np.int64)),
            _slices(_flat(users["items"]), starts, starts + length),
            pa.array(np.maximum(1, length - examples_per_user)),
        ],
        schema=TRAINING,
    )


def training_of_published(rows: pa.Table, *, examples_per_user: int) -> pa.Table:
    """Return rows of `TRAINING` from published training rows of whole users.

    Published rows often are windows over one history: a row whose history ends the history and target of the row before
    (of the same user) goes on with it, so the two become one history, one item longer. Any other row starts another
    history. Examples are cut at the published targets only, the latest `examples_per_user` of a user.
    """
    rows = rows.sort_by([("user_id", "ascending"), ("row", "ascending")]).combine_chunks()
    if rows.num_rows == 0:
        return TRAINING.empty_table()
    goes_on = _goes_on(rows)
    first = np.flatnonzero(~goes_on)
    count = np.diff(np.append(first, len(goes_on)))  # rows, so targets, of each chain
    history_length = _lengths(rows["history"])
    starts = _offsets(history_length)[:-1].astype(np.int64)[first]
    histories = _slices(_flat(rows["history"]), starts, starts + history_length[first])
    targets = pa.ListArray.from_arrays(pa.array(_offsets(count)), rows["target"].combine_chunks())
    items = _joined(histories, targets)
    owners = rows["user_id"].combine_chunks().take(pa.array(first))
    user = owners.dictionary_encode().indices.to_numpy(zero_copy_only=False)
    so_far = np.cumsum(count)
    last_chain = np.searchsorted(user, user, side="right") - 1
    after = so_far[last_chain] - so_far  # targets of the user's later histories
    wanted = np.clip(examples_per_user - after, 0, count)
    first_target = history_length[first] + count - wanted
    order = rows["row"].combine_chunks().take(pa.array(first))
    return pa.table([owners, order, items, pa.array(first_target)], schema=TRAINING)


def examples_of(training: pa.Table, *, max_history: int) -> pa.Table:
    """Return user_id, history and target, one row a cut, in order of the rows and of time."""
    lengths = _lengths(training["items"])
    first = training["first_target"].to_numpy()
    count = lengths - first
    owner = np.repeat(np.arange(len(count)), count)
    place = first[owner] + _places(count)
    start = _offsets(lengths)[:-1].astype(np.int64)[owner]
    items = _flat(training["items"])
    history = _slices(items, start + np.maximum(0, place - max_history), start + place)
    users = training["user_id"].combine_chunks().take(pa.array(owner))
    return pa.table({"user_id": users, "history": history, "target": pa.array(items[start + place], pa.int32())})


def targets_of(
    users: pa.Table, cut: Cut, split: str, *, most_per_user: int, most: int, seed: int
) -> tuple[pa.Table, dict[str, int]]:
    """Return rows of `TARGETS`, held-out interactions of one split, and what became of all that are held out.

    At most `most_per_user` of a user and `most` in all are kept, chosen by seeded hashes. An interaction with nothing
    before it can't be a row: there is no history to recommend from.
    """
    lengths = _lengths(users["items"])
    owner = np.repeat(np.arange(len(lengths)), lengths)
    place = _places(lengths)
    held_out = cut.part == SPLIT_NUMBERS[split]
    at = np.flatnonzero(held_out & (place > 0))
    counts = {"held_out": int(held_out.sum()), "without_history": int(held_out.sum()) - len(at)}
    hashes = hash_strings(users["user_id"])
    draw = mix(seed, 6, SPLIT_NUMBERS[split], hashes[owner[at]], place[at])
    chosen = at[_smallest_by_group(owner[at], draw, most_per_user)]
    counts |= {"beyond_targets_per_user": len(at) - len(chosen), "eligible": len(chosen)}
    draw = mix(seed, 7, SPLIT_NUMBERS[split], hashes[owner[chosen]], place[chosen])
    best = np.argsort(draw, kind="stable")[:most]
    at, draw = chosen[best], draw[best]
    start = _offsets(lengths)[:-1].astype(np.int64)[owner[at]]
    items = _flat(users["items"])
    columns = [
        users["user_id"].combine_chunks().take(pa.array(owner[at])),
        pa.array(place[at]),
        _slices(items, start, at),
        pa.array(items[at], pa.int32()),
        pa.nulls(len(at), ITEMS),
        pa.array(draw),
    ]
    return pa.table(columns, schema=TARGETS), counts


def targets_of_published(rows: pa.Table, split: str, *, seed: int) -> pa.Table:
    """Return rows of `TARGETS` from the published rows of one split; those with candidates come first."""
    rows = rows.filter(pc.equal(rows["split"], split)).combine_chunks()
    draw = mix(seed, 7, SPLIT_NUMBERS[split], hash_strings(rows["user_id"]), rows["row"].to_numpy()) >> np.uint64(1)
    draw |= np.where(pc.is_null(rows["candidates"]).to_numpy(), np.uint64(1 << 63), np.uint64(0))
    return pa.table(
        [rows["user_id"], rows["row"], rows["history"], rows["target"], rows["candidates"], pa.array(draw)], TARGETS
    )


def fewest_draws(targets: pa.Table, most: int) -> pa.Table:
    """Return the `most` rows with the smallest draws, in order of user and then of time."""
    chosen = np.argsort(targets["draw"].to_numpy(), kind="stable")[:most]
    return targets.take(chosen).sort_by([("user_id", "ascending"), ("order", "ascending")])


def evaluation_rows(
    targets: pa.Table,
    *,
    first_row: int,
    num_candidates: int,
    num_items: int,
    max_history: int,
    split: str,
    seed: int,
) -> pa.Table:
    """Return rows of `EVALUATION`, numbered from `first_row`, with published candidates kept and others drawn.

    A published list loses repetitions and gets the target where it lacks it, at a seeded place. The others get
    `num_candidates` with the target, fewer where the catalogue holds no more that the user has not met.
    """
    rows = first_row + np.arange(targets.num_rows)
    met_lengths = _lengths(targets["met"])
    ends = _offsets(met_lengths)[1:].astype(np.int64)
    history = _slices(_flat(targets["met"]), ends - np.minimum(met_lengths, max_history), ends)
    key = mix(seed, SPLIT_NUMBERS[split], rows)
    published = pc.is_valid(targets["candidates"]).to_numpy()
    target = targets["target"].to_numpy()
    lists: list[pa.Array] = []
    order = np.concatenate([np.flatnonzero(published), np.flatnonzero(~published)])
    if published.any():
        mine = targets.filter(pa.array(published))
        lists.append(_completed(mine["candidates"].combine_chunks(), target[published], key[published]))
    if not published.all():
        mine = targets.filter(pa.array(~published))
        met = mine["met"].combine_chunks()
        lists.append(
            drawn_candidates(met, target[~published], key[~published], count=num_candidates, num_items=num_items)
        )
    candidates = pa.concat_arrays(lists).take(pa.array(np.argsort(order))) if lists else pa.array([], ITEMS)
    columns = {"row": rows, "user_id": targets["user_id"], "history": history, "target": targets["target"]}
    return pa.table(columns | {"candidates": candidates})


def list_size(targets: pa.Table, default: int) -> int:
    """Return how many candidates most published lists have, the target counted; `default` where none is published."""
    published = targets.filter(pc.is_valid(targets["candidates"]))
    if published.num_rows == 0:
        return default
    target = published["target"].to_numpy()
    lists = _completed(published["candidates"].combine_chunks(), target, mix(target))
    return int(np.bincount(_lengths(lists)).argmax())


def drawn_candidates(
    met: pa.ListArray, target: NDArray[np.int32], key: Hash, *, count: int, num_items: int
) -> pa.ListArray:
    """Return `count` candidates a row: the target at a seeded place, the others uniform over the rest that is unmet.

    Each row walks through one endless draw that its key alone decides, whatever the target, and takes the first
    `count` - 1 items that are new, unmet and not the target. So a larger count begins with a smaller one's, and rows
    with one target share no more negatives than other rows do.
    """
    met_lengths = _lengths(met)
    owner = np.repeat(np.arange(len(target)), met_lengths)
    barred = owner * num_items + _flat(met)
    barred = np.unique(np.concatenate([barred, np.arange(len(target)) * num_items + target]))
    wanted = np.minimum(count - 1, num_items - np.bincount(barred // num_items, minlength=len(target)))
    negatives = np.full((len(target), count - 1), -1, dtype=np.int32)
    waiting = np.flatnonzero(wanted > 0)
    width, widest = 2 * count, 4 * num_items
    while len(waiting):
        width = min(width, widest)
        draws = (mix(key[waiting][:, None], 1, np.arange(width)[None, :]) % np.uint64(num_items)).astype(np.int64)
        if width == widest:  # nearly all is barred: what the draw has not reached follows, shuffled
            rest = np.argsort(mix(key[waiting][:, None], 2, np.arange(num_items)[None, :]), axis=1)
            draws = np.concatenate([draws, rest], axis=1)
        good = _new_in_row(draws) & ~np.isin(waiting[:, None] * num_items + draws, barred)
        taken = np.cumsum(good, axis=1)
        done = taken[:, -1] >= wanted[waiting]
        where, column = np.nonzero(good & (taken <= wanted[waiting][:, None]) & done[:, None])
        negatives[waiting[where], taken[where, column] - 1] = draws[where, column]
        waiting = waiting[~done]
        width *= 4
    return _with_target(negatives, wanted, target, key)


def _with_target(negatives: NDArray[np.int32], wanted: Ints, target: NDArray[np.int32], key: Hash) -> pa.ListArray:
    """Return the negatives with the target put among them, at a place drawn for the row."""
    length = wanted + 1
    place = (mix(key, 3) % length.astype(np.uint64)).astype(np.int64)
    row = np.repeat(np.arange(len(target)), length)
    column = _places(length)
    from_negatives = np.minimum(column - (column > place[row]), max(negatives.shape[1] - 1, 0))
    values = np.where(column == place[row], target[row], negatives[row, from_negatives])
    return pa.ListArray.from_arrays(pa.array(_offsets(length)), pa.array(values.astype(np.int32)))


def _completed(candidates: pa.ListArray, target: NDArray[np.int32], key: Hash) -> pa.ListArray:
    """Return published candidates without repetitions, the target put in at a seeded place where it is missing."""
    lengths = _lengths(candidates)
    row = np.repeat(np.arange(len(target)), lengths)
    items = _flat(candidates)
    _, first = np.unique(np.stack([row, items]), axis=1, return_index=True)
    row, items = row[np.sort(first)], items[np.sort(first)]
    has = np.zeros(len(target), dtype=bool)
    has[row[items == target[row]]] = True
    lengths = np.bincount(row, minlength=len(target))
    position = _places(lengths).astype(np.float64)
    lacking = np.flatnonzero(~has)
    place = (mix(key[lacking], 3) % (lengths[lacking] + 1).astype(np.uint64)).astype(np.float64) - 0.5
    rows, all_items = np.append(row, lacking), np.append(items, target[lacking])
    order = np.lexsort([np.append(position, place), rows])
    offsets = _offsets(lengths + ~has)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(all_items[order].astype(np.int32)))


def _new_in_row(draws: Ints) -> NDArray[np.bool_]:
    """Return which entries appear for the first time in their row."""
    order = np.argsort(draws, axis=1, kind="stable")
    ordered = np.take_along_axis(draws, order, axis=1)
    first = np.ones(draws.shape, dtype=bool)
    first[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    new = np.empty_like(first)
    np.put_along_axis(new, order, first, axis=1)
    return new


def _goes_on(rows: pa.Table) -> NDArray[np.bool_]:
    """Return which rows' history is the tail of the history and target of the row before, of the same user."""
    history, length = _flat(rows["history"]), _lengths(rows["history"])
    full = _joined(rows["history"].combine_chunks(), _singles(rows["target"].combine_chunks()))
    full_items, full_ends = _flat(full), _offsets(_lengths(full))[1:].astype(np.int64)
    users = rows["user_id"].combine_chunks().dictionary_encode().indices.to_numpy(zero_copy_only=False)
    possible = np.zeros(len(length), dtype=bool)
    possible[1:] = (users[1:] == users[:-1]) & (length[1:] <= length[:-1] + 1) & (length[1:] >= length[:-1])
    which = np.flatnonzero(possible)
    row = np.repeat(which, length[which])
    place = _places(length[which])
    mine = history[_offsets(length)[:-1].astype(np.int64)[row] + place]
    theirs = full_items[full_ends[row - 1] - length[row] + place]
    differs = np.zeros(len(length), dtype=bool)
    differs[row[mine != theirs]] = True
    return possible & ~differs


def _smallest_by_group(group: Ints, draw: Hash, most: int) -> Ints:
    """Return the places of the `most` smallest draws of each group; groups stand together."""
    order = np.lexsort([draw, group])
    counts = np.bincount(group) if len(group) else np.zeros(0, dtype=np.int64)
    return order[_places(counts[counts > 0]) < most]


def _joined(left: pa.ListArray, right: pa.ListArray) -> pa.ListArray:
    """Return each left list with the right list of its row after it."""
    sizes = np.stack([_lengths(left), _lengths(right)], axis=1)
    source = np.concatenate([_flat(left), _flat(right)])
    starts = np.stack([_offsets(sizes[:, 0])[:-1], _offsets(sizes[:, 1])[:-1] + sizes[:, 0].sum()], axis=1)
    flat_starts = starts.ravel().astype(np.int64)
    values = source[np.repeat(flat_starts, sizes.ravel()) + _places(sizes.ravel())]
    return pa.ListArray.from_arrays(pa.array(_offsets(sizes.sum(axis=1))), pa.array(values.astype(np.int32)))


def _singles(values: pa.Array) -> pa.ListArray:
    return pa.ListArray.from_arrays(pa.array(np.arange(len(values) + 1, dtype=np.int32)), values)


def _slices(values: NDArray[Any], starts: Ints, stops: Ints) -> pa.ListArray:
    """Return the lists values[start:stop]."""
    lengths = stops - starts
    taken = values[np.repeat(starts, lengths) + _places(lengths)]
    return pa.ListArray.from_arrays(pa.array(_offsets(lengths)), pa.array(taken))


def _places(lengths: Ints) -> Ints:
    """Return 0 .. length - 1 for each length, end to end."""
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if len(ends) else 0
    return np.arange(total) - np.repeat(ends - lengths, lengths)


def _offsets(lengths: Ints) -> NDArray[np.int32]:
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)


def _lengths(lists: pa.Array | pa.ChunkedArray) -> Ints:
    lengths = pc.list_value_length(lists)
    return np.asarray(lengths.to_numpy() if isinstance(lengths, pa.ChunkedArray) else lengths).astype(np.int64)


def _flat(lists: pa.Array | pa.ChunkedArray) -> NDArray[Any]:
    flat = pc.list_flatten(lists)
    values: NDArray[Any] = flat.to_numpy() if isinstance(flat, pa.ChunkedArray) else flat.to_numpy(zero_copy_only=False)
    return values


def _sum_by_user(values: NDArray[np.bool_], lengths: Ints) -> Ints:
    running = np.concatenate([[0], np.cumsum(values)])
    ends = np.cumsum(lengths)
    sums: Ints = running[ends] - running[ends - lengths]
    return sums
