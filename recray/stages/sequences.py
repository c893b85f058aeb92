"""Histories, splits and evaluation candidates, by Ray Data.

    interactions ── hash partition by user ── whole logs of users, sorted ── cut ──▶ histories, train
                                                                             └────▶ validation, test

One vectorised call a partition builds the users; no Python call is made a user. Rows are numbered in order of user and
time, so they are the same however many partitions there are.
"""

import logging
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray
import ray.data
from numpy.typing import NDArray
from pyarrow import fs as pafs
from ray import ObjectRef

from recray.config import Sequences
from recray.data.sequences import (
    TARGETS,
    cut_at_times,
    cut_before_targets,
    cut_last,
    cut_moments,
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
from recray.errors import DataError
from recray.schema import EVALUATION, EXAMPLES, HISTORIES, ITEMS
from recray.stages.flow import Job

logger = logging.getLogger(__name__)

ROWS_PER_PARTITION = 2_000_000
DRAWS_PER_CHUNK = 4_000_000
HELD_OUT = ("validation", "test")
OTHER_SPLITS = "take sequences.split published (where the data has sequences) or leave_one_out"


class Block(NamedTuple):
    """What one partition became: two tables that stay where they are, and what the driver needs to go on."""

    training: ObjectRef
    targets: dict[str, pa.Table]
    counts: dict[str, dict[str, int]]
    taught: NDArray[np.bool_]  # which items are in a training history


def run(job: Job) -> None:
    """Write `histories`, `train`, `validation` and `test`."""
    part: Sequences = job.part
    ingest = job.workspace.require("ingest")
    num_items = ingest.counts["items"]
    if part.split == "published":
        blocks, targets = _published(job, part, num_items)
    else:
        blocks, targets = _from_log(job, part, num_items)
    counts = _summed([block.counts for block in blocks])
    _write_training(job, blocks, part.max_history, counts)
    taught = np.logical_or.reduce([block.taught for block in blocks])
    for split in HELD_OUT:
        rows = _write_evaluation(job, part, split, targets[split], num_items)
        account = counts.setdefault(split, {"eligible": targets[split].num_rows})
        account["beyond_max_rows"] = account.pop("eligible") - rows.num_rows
        account["written"] = rows.num_rows
        account["users"] = len(rows["user_id"].unique())
        account["cold_targets"] = int((~taught[rows["target"].to_numpy()]).sum())
        _require_rows(split, account, part)
    job.out.facts |= {"split": part.split, "rows": counts}


def _from_log(job: Job, part: Sequences, num_items: int) -> tuple[list[Block], dict[str, pa.Table]]:
    ingest = job.workspace.require("ingest")
    num_rows = ingest.counts["interactions"]
    if num_rows == 0:
        raise DataError(f"the data has no interactions, which sequences.split {part.split} needs; use published")
    moments: tuple[int, int] | None = None
    if part.split == "time_cut":
        if not ingest.facts["clock"]:
            raise DataError(f"the log has positions but no timestamps, so no moment to cut at; {OTHER_SPLITS}")
        times = job.workspace.table("ingest", "interactions", ["time"])["time"].to_numpy()
        moments = cut_moments(times, validation=part.validation_fraction, test=part.test_fraction)
        job.out.facts["cut_times"] = {"validation_from": moments[0], "test_from": moments[1]}
    split = ray.remote(num_returns=2)(_split)
    users = _users(job, num_rows)
    made = [split.remote(ref, part, moments, job.seed, num_items) for ref in users]
    blocks = [Block(training, *ray.get(rest)) for training, rest in made]
    return blocks, {name: _fewest([block.targets[name] for block in blocks], part, name) for name in HELD_OUT}


def _users(job: Job, num_rows: int) -> list[ObjectRef]:
    """Return users with their whole logs, in order of user over all blocks."""
    rows = ray.data.read_parquet(job.workspace.path("ingest", "interactions"), filesystem=job.workspace.fs)
    return _by_user(rows, num_rows, users_of, ["user_id"])


def _by_user(
    rows: ray.data.Dataset, num_rows: int, build: Callable[[pa.Table], pa.Table], order: list[str]
) -> list[ObjectRef]:
    """Partition rows by user, build a table of each partition, and sort what was built over all partitions."""
    partitions = -(-num_rows // ROWS_PER_PARTITION)
    rows = rows.repartition(partitions, keys=["user_id"]) if partitions > 1 else rows.repartition(1)
    built = rows.map_batches(build, batch_format="pyarrow", batch_size=None)
    # A user is one row by now (or rows that need no neighbour), so a border of the sort can't cut one in two.
    ordered = built.sort(order) if partitions > 1 else built
    refs: list[ObjectRef] = ordered.to_arrow_refs()
    return refs


def _split(
    users: pa.Table, part: Sequences, moments: tuple[int, int] | None, seed: int, num_items: int
) -> tuple[pa.Table, tuple[dict[str, pa.Table], dict[str, dict[str, int]], NDArray[np.bool_]]]:
    lengths = user_lengths(users)
    if moments is not None:
        cut = cut_at_times(lengths, user_times(users), validation_from=moments[0], test_from=moments[1])
        most_per_user = part.targets_per_user
    else:
        last = part.leave_last if part.split == "leave_last_n" else 1
        cut = cut_last(lengths, last)
        most_per_user = last
    training = training_of(users, cut.train_length, examples_per_user=part.examples_per_user)
    targets, counts = {}, {"train": _training_account(training, cut.train_length)}
    for name in HELD_OUT:
        targets[name], counts[name] = targets_of(
            users, cut, name, most_per_user=most_per_user, most=_most(part, name), seed=seed
        )
    return training, (targets, counts, _taught(training, num_items))


def _published(job: Job, part: Sequences, num_items: int) -> tuple[list[Block], dict[str, pa.Table]]:
    """Return blocks and targets of the split that the data publishes."""
    if not job.workspace.exists("ingest", "published"):
        raise DataError(
            "the data publishes no sequences (a table `sequences` beside the log), which sequences.split published "
            "needs; use time_cut or leave_one_out"
        )
    rows = job.workspace.table("ingest", "published")
    if part.fresh_candidates:
        place = rows.column_names.index("candidates")
        rows = rows.set_column(place, "candidates", pa.nulls(rows.num_rows, ITEMS))
    targets = {name: targets_of_published(rows, name, seed=job.seed) for name in HELD_OUT}
    counts = {name: {"held_out": each.num_rows, "eligible": each.num_rows} for name, each in targets.items()}
    train = rows.filter(pc.equal(rows["split"], "train"))
    refs = _published_training(part, train) if train.num_rows else _training_before(job, part, targets)
    describe = ray.remote(_described)
    described = ray.get([describe.remote(ref, num_items) for ref in refs])
    blocks = [
        Block(ref, {}, {"train": account}, taught) for ref, (account, taught) in zip(refs, described, strict=True)
    ]
    blocks[0].counts.update(counts)
    return blocks, {name: _fewest([each], part, name) for name, each in targets.items()}


def _published_training(part: Sequences, train: pa.Table) -> list[ObjectRef]:
    def build(rows: pa.Table) -> pa.Table:
        return training_of_published(rows, examples_per_user=part.examples_per_user)

    return _by_user(ray.data.from_arrow(train), train.num_rows, build, ["user_id", "order"])


def _training_before(job: Job, part: Sequences, targets: dict[str, pa.Table]) -> list[ObjectRef]:
    """Return training histories from the log: of each user what comes before the first published target."""
    num_rows = job.workspace.require("ingest").counts["interactions"]
    if num_rows == 0:
        raise DataError("the published sequences have no rows of split train, and there is no log to train on")
    both = pa.concat_tables(list(targets.values()))
    names = {"user_id": both["user_id"], "target": both["target"], "last": _last_items(both["met"])}
    held_out = ray.put(pa.table(names))

    def train(users: pa.Table) -> pa.Table:
        length = cut_before_targets(users, ray.get(held_out))
        return training_of(users, length, examples_per_user=part.examples_per_user)

    task = ray.remote(train)
    return [task.remote(ref) for ref in _users(job, num_rows)]


def _last_items(lists: pa.ChunkedArray) -> pa.Array:
    ends = np.cumsum(pc.list_value_length(lists).to_numpy())
    return pa.array(pc.list_flatten(lists).to_numpy()[ends - 1], pa.int32())


def _described(training: pa.Table, num_items: int) -> tuple[dict[str, int], NDArray[np.bool_]]:
    return _training_account(training, None), _taught(training, num_items)


def _training_account(training: pa.Table, train_length: NDArray[np.int64] | None) -> dict[str, int]:
    """Return the numbers of histories, examples and interactions in training, and of what was too short for it."""
    lengths = user_lengths(training)
    account = {
        "histories": training.num_rows,
        "interactions": int(lengths.sum()),
        "examples": int((lengths - training["first_target"].to_numpy()).sum()),
    }
    if train_length is not None:
        short = train_length[train_length < 2]
        account |= {"users_below_two": len(short), "interactions_of_users_below_two": int(short.sum())}
    return account


def _taught(training: pa.Table, num_items: int) -> NDArray[np.bool_]:
    met = np.zeros(num_items, dtype=bool)
    met[pc.list_flatten(training["items"]).to_numpy()] = True
    return met


def _most(part: Sequences, split: str) -> int:
    return part.max_validation_rows if split == "validation" else part.max_test_rows


def _fewest(targets: list[pa.Table], part: Sequences, split: str) -> pa.Table:
    return fewest_draws(pa.concat_tables([TARGETS.empty_table(), *targets]), _most(part, split))


def _summed(counts: list[dict[str, dict[str, int]]]) -> dict[str, dict[str, int]]:
    total: dict[str, dict[str, int]] = {}
    for each in counts:
        for group, values in each.items():
            mine = total.setdefault(group, {})
            for name, value in values.items():
                mine[name] = mine.get(name, 0) + value
    return total


def _write_training(job: Job, blocks: list[Block], max_history: int, counts: dict[str, dict[str, int]]) -> None:
    """Let every block write its own files, named and numbered by the rows before it."""
    if counts["train"]["examples"] == 0:
        raise DataError(f"no history has two interactions before what is held out: nothing to train on ({counts})")
    for name in ("histories", "train"):
        job.out.fs.create_dir(job.out.path(name), recursive=True)
    write = ray.remote(_write_block)
    folders = (job.out.path("histories"), job.out.path("train"))
    first, writing = [0, 0], []
    for block in blocks:
        writing.append(write.remote(block.training, job.out.fs, folders, tuple(first), max_history))
        first[0] += block.counts["train"]["histories"]
        first[1] += block.counts["train"]["examples"]
    ray.get(writing)
    job.out.counts |= {"histories": first[0], "train": first[1]}


def _write_block(
    training: pa.Table, fs: pafs.FileSystem, folders: tuple[str, str], first: tuple[int, int], max_history: int
) -> None:
    examples = examples_of(training, max_history=max_history)
    tables = (training.select(["user_id", "items"]), examples)
    for table, folder, row, schema in zip(tables, folders, first, (HISTORIES, EXAMPLES), strict=True):
        numbered = table.add_column(0, "row", pa.array(row + np.arange(table.num_rows))).cast(schema)
        pq.write_table(numbered, f"{folder}/part-{row:012d}.parquet", filesystem=fs, compression="zstd")


def _write_evaluation(job: Job, part: Sequences, split: str, targets: pa.Table, num_items: int) -> pa.Table:
    """Write one held-out split with its candidates."""
    size = list_size(targets, part.num_candidates)
    step = max(1, DRAWS_PER_CHUNK // (2 * size))
    chunks = [
        evaluation_rows(
            targets.slice(first, step),
            first_row=first,
            num_candidates=size,
            num_items=num_items,
            max_history=part.max_history,
            split=split,
            seed=job.seed,
        ).cast(EVALUATION)
        for first in range(0, targets.num_rows, step)
    ]
    rows = pa.concat_tables([EVALUATION.empty_table(), *chunks])
    drawn = rows.filter(pc.is_null(targets["candidates"]))
    short = pc.sum(pc.less(pc.list_value_length(drawn["candidates"]), size)).as_py() or 0
    if short:
        told = (
            "%s: %d rows have fewer than %d candidates: the catalogue of %d items holds no more that is new to the user"
        )
        logger.warning(told, split, short, size, num_items)
    job.out.write_table(split, rows)
    job.out.facts[f"{split}_candidates"] = size
    return rows


def _require_rows(split: str, account: dict[str, int], part: Sequences) -> None:
    if account["written"]:
        return
    told = ", ".join(f"{name} {count:,}" for name, count in account.items())
    raise DataError(
        f"sequences.split {part.split} leaves no row to use for {split} ({told}); histories are too short, or too few "
        "interactions fall into its window: take another split, other fractions, or more data"
    )
