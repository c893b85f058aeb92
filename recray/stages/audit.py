"""Before any model: what rules without learning find, on the very rows and candidates that models will be judged by.

Rules are fitted to training histories and to candidate lists of training and validation rows, and score test rows. What
they find decides nothing: no stage but the report reads it.
"""

import logging
import time
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray
import ray.data
from numpy.typing import NDArray

from recray.config import Audit
from recray.errors import DataError
from recray.ranking.baselines import Cooccurrence, Popularity, item_popularity
from recray.ranking.behaviour import Listed, Recency, RecentPopularity, Transitions
from recray.ranking.intervals import clustered_means
from recray.ranking.orders import (
    Order,
    ascending_share,
    consecutive,
    order_of_histories,
    order_of_ids,
    order_of_titles,
)
from recray.ranking.rows import flat_lists
from recray.ranking.rules import (
    ListOverlap,
    Lists,
    NearestInOrder,
    NextInOrder,
    Position,
    Rows,
    Rule,
    TargetShare,
    found_first,
)
from recray.ranking.split_facts import (
    Fact,
    Log,
    Training,
    duplicate_facts,
    row_facts,
    row_hashes,
    time_facts,
    times_of,
)
from recray.ranking.verdicts import BASELINE, DRAWN, LEAK, LISTED, ORDERED, SUSPECT, Measured, judge, leaks, line
from recray.schema import AUDIT
from recray.stages.flow import Job
from recray.workspace import Workspace

logger = logging.getLogger(__name__)

ROWS_AT_ONCE = 2_048
RESERVED = ("id", "title", "order")  # how orders are named that are no column of the user's
# Training histories that are counted, a seeded part of more: co-occurrence holds every pair within a history.
FITTED_PAIRS, FITTED_NEIGHBOURS = 100_000, 500_000
FITTED_LISTS = 200_000  # what rules about candidate lists are fitted to; a seeded part of more


class Suspect(NamedTuple):
    """A rule with what its verdict says about it."""

    name: str
    rule: Rule
    family: str = ""
    what: str = ""


class Trained(NamedTuple):
    """The training histories, users as codes, and the log with its times where it has a clock."""

    histories: Training
    log: Log | None
    times: NDArray[np.int64] | None  # when each item of the histories was first met; -1 where the log does not hold it
    names: pa.Array  # of the users that the codes stand for


def run(job: Job) -> None:
    """Write `rules` and `facts.json`; warn of every leak.

    Raises:
        DataError: if there are no test rows.
    """
    part: Audit = job.part
    test = job.workspace.table("sequences", "test")
    if test.num_rows == 0:
        raise DataError("sequences/test has no rows, so there is nothing to audit; see sequences.test_fraction")
    clock = [time.monotonic()]
    items = job.workspace.table("ingest", "items", ["item_id", "title"])
    trained = _trained(job.workspace, len(items))
    sample = test.take(_sampled(test.num_rows, part.rows, job.seed))
    clock.append(time.monotonic())
    neighbours = consecutive(trained.histories.items, trained.histories.lengths)
    orders = _orders(job, items, *neighbours)
    baselines = _baselines(trained, len(items), job.seed)
    suspects = _suspects(job, orders, *neighbours)
    clock.append(time.monotonic())
    found = _score([*baselines, *suspects], sample)
    measured, chance = _measured(baselines, suspects, found, sample, part, job.seed)
    rules = _table(measured, chance)
    job.out.write_table("rules", rules)
    clock.append(time.monotonic())
    facts = _facts(job.workspace, test, trained, len(items))
    job.out.write_json("facts.json", [fact._asdict() for fact in facts])
    job.out.facts |= _told(rules, facts, orders, sample, test.num_rows)
    clock.append(time.monotonic())
    parts = zip(("read", "fit", "score", "facts"), np.diff(clock).tolist(), strict=True)
    job.out.facts["seconds"] = {name: round(seconds, 2) for name, seconds in parts}
    for rule in rules.to_pylist():
        logger.info("audit: %s", line(rule))
    for rule in leaks(rules.to_pylist()):
        logger.warning("audit: %s leaks: HR@1 %.3f. %s %s", rule["rule"], rule["value"], rule["reason"], rule["advice"])


def _sampled(num_rows: int, most: int, seed: int) -> pa.Array:
    """Return the places of all rows, or of a seeded sample."""
    if num_rows <= most:
        return pa.array(np.arange(num_rows))
    return pa.array(np.sort(np.random.default_rng([seed, 8]).choice(num_rows, most, replace=False)))


def _trained(workspace: Workspace, num_items: int) -> Trained:
    histories = workspace.table("sequences", "histories", ["user_id", "items"])
    flat, lengths = flat_lists(histories["items"])
    known = workspace.require("ingest")
    log = None
    if known.facts["clock"] and known.counts["interactions"]:
        table = workspace.table("ingest", "interactions", ["user_id", "item", "time"])
        users = table["user_id"].combine_chunks().dictionary_encode()
        names = users.dictionary
        codes = users.indices.to_numpy(zero_copy_only=False).astype(np.int64)
        log = Log(codes, table["item"].to_numpy().astype(np.int64), table["time"].to_numpy())
    else:
        names = pc.unique(histories["user_id"])
    training = Training(flat.astype(np.int64), lengths, _codes(histories["user_id"], names))
    times = None
    if log is not None:
        times = times_of(log, training.owners, training.items, num_items, latest=False)
    return Trained(training, log, times, names)


def _codes(users: pa.ChunkedArray, names: pa.Array) -> NDArray[np.int64]:
    codes: NDArray[np.int64] = pc.fill_null(pc.index_in(users, value_set=names), -1).to_numpy().astype(np.int64)
    return codes


def _orders(job: Job, items: pa.Table, first: NDArray[np.int64], second: NDArray[np.int64]) -> list[Order]:
    """Return what items may have been sorted by: every id, the title, and what the histories themselves follow.

    Args:
        items: of `ingest`, in `item` order.
        first, second: neighbours in training histories.
    """
    orders = [order_of_ids("id", items["item_id"])]
    if job.workspace.exists("ingest", "other_ids"):
        others = job.workspace.table("ingest", "other_ids")
        for name in pc.unique(others["column"]).to_pylist():
            column = others.filter(pc.equal(others["column"], name))
            values, known = np.zeros(len(items), dtype=np.int64), np.zeros(len(items), dtype=bool)
            values[column["item"].to_numpy()], known[column["item"].to_numpy()] = column["number"].to_numpy(), True
            orders.append(Order(f"{name} column" if name in RESERVED else name, values, known))
    else:
        logger.warning("audit: other ids of the catalogue were not kept; `recray ingest --force ingest` keeps them")
    orders.append(order_of_titles(items["title"]))
    orders.append(order_of_histories(first, second, len(items), seed=job.seed))
    return orders


def _baselines(trained: Trained, num_items: int, seed: int) -> list[Suspect]:
    histories = trained.histories
    popularity = item_popularity(histories.items, num_items)
    paired = _some(histories.items, histories.lengths, FITTED_PAIRS, seed)
    first, second = consecutive(*_some(histories.items, histories.lengths, FITTED_NEIGHBOURS, seed))
    baselines = [
        Suspect("popularity", Listed(Popularity(popularity))),
        Suspect("recency", Recency(num_items)),
        Suspect("co-occurrence", Listed(Cooccurrence.of(*paired, num_items))),
        Suspect("transitions", Transitions.of(first, second, popularity)),
    ]
    if trained.times is not None:
        known = trained.times >= 0
        recent = RecentPopularity.of(histories.items[known], trained.times[known], num_items)
        baselines.insert(1, Suspect("recent popularity", recent))
    return baselines


def _suspects(job: Job, orders: list[Order], first: NDArray[np.int64], second: NDArray[np.int64]) -> list[Suspect]:
    """Return every suspect, fitted; arguments as of `_orders`."""
    *ids, title, hidden = orders
    suspects = []
    descends = {order.name: ascending_share(order, first, second) < 0.5 for order in orders}
    for order in ids:
        descending = descends[order.name]
        name = f"largest {order.name} below" if descending else f"smallest {order.name} above"
        suspects.append(Suspect(name, NextInOrder(order, descending), ORDERED, order.name))
        suspects.append(Suspect(f"nearest {order.name}", NearestInOrder(order), ORDERED, order.name))
    suspects.append(Suspect("title order", NextInOrder(title, descends[title.name]), ORDERED, "title"))
    what = "one order of the items that all histories follow"
    suspects.append(Suspect("one order of all histories", NextInOrder(hidden), ORDERED, what))
    lists, num_items = _lists(job), len(title.values)
    family = LISTED if _published_lists(job.workspace, "test") is not None else DRAWN
    suspects += [
        Suspect("list overlap", ListOverlap.of(lists, num_items), family),
        Suspect("target's share of lists", TargetShare.of(lists, num_items), family),
        Suspect("first in the list", Position(np.zeros(1, dtype=np.int64), from_end=False), family),
        Suspect("last in the list", Position(np.zeros(1, dtype=np.int64), from_end=True), family),
        Suspect("best place in the list", Position.of(lists), family),
    ]
    return suspects


def _lists(job: Job) -> Lists:
    """Return candidate lists with their targets: of validation, and of training rows where they were published."""
    validation = _lists_of(job.workspace.table("sequences", "validation", ["target", "candidates"]))
    train = _published_lists(job.workspace, "train")
    if train is None:
        return validation
    both = [validation, _lists_of(train)]
    joined = Lists(*(np.concatenate(columns) for columns in zip(*both, strict=True)))
    candidates, lengths = _some(joined.candidates, joined.lengths, FITTED_LISTS, job.seed)
    chosen = _chosen(len(joined.lengths), FITTED_LISTS, job.seed)
    return Lists(candidates, lengths, joined.targets[chosen])


def _published_lists(workspace: Workspace, split: str) -> pa.Table | None:
    """Return the published rows of a split that have candidates, if they have any and these are used."""
    settings = workspace.require("sequences").part
    if settings["split"] != "published" or settings["fresh_candidates"]:
        return None
    published = workspace.table("ingest", "published", ["split", "target", "candidates"])
    rows = published.filter(pc.and_(pc.equal(published["split"], split), pc.is_valid(published["candidates"])))
    return rows if rows.num_rows else None


def _lists_of(table: pa.Table) -> Lists:
    candidates, lengths = flat_lists(table["candidates"])
    return Lists(candidates.astype(np.int64), lengths, table["target"].to_numpy().astype(np.int64))


def _chosen(count: int, most: int, seed: int) -> NDArray[np.bool_]:
    """Return which of `count` rows are kept, `most` of them at random where there are more."""
    chosen = np.zeros(count, dtype=bool)
    chosen[np.random.default_rng([seed, 9]).permutation(count)[:most]] = True
    return chosen


def _some(
    items: NDArray[Any], lengths: NDArray[np.int64], most: int, seed: int
) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """Return the lists, laid end to end, that `_chosen` keeps."""
    chosen = _chosen(len(lengths), most, seed)
    return items[np.repeat(chosen, lengths)], lengths[chosen]


def _score(suspects: list[Suspect], sample: pa.Table) -> dict[str, NDArray[np.bool_]]:
    """Return in which rows of the sample each rule finds the target, by Ray Data over blocks of rows."""
    stored = ray.put([(each.name, each.rule) for each in suspects])

    def find(block: pa.Table) -> pa.Table:
        rows, targets = Rows.of(block), block["target"].to_numpy().astype(np.int64)
        found = {name: found_first(rule(rows), rows, targets) for name, rule in ray.get(stored)}
        return pa.table({"row": block["row"], **{name: pa.array(hits) for name, hits in found.items()}})

    dataset = ray.data.from_arrow(sample.combine_chunks()).repartition(-(-sample.num_rows // ROWS_AT_ONCE))
    blocks = dataset.map_batches(find, batch_format="pyarrow", batch_size=None).iter_batches(
        batch_format="pyarrow", batch_size=None
    )
    table = pa.concat_tables(list(blocks)).sort_by("row")
    if not np.array_equal(table["row"].to_numpy(), np.sort(sample["row"].to_numpy())):
        raise DataError(f"expected {sample.num_rows} audited rows, got {table.num_rows}; run `recray audit` again")
    return {each.name: table[each.name].to_numpy() for each in suspects}


def _measured(
    baselines: list[Suspect],
    suspects: list[Suspect],
    found: dict[str, NDArray[np.bool_]],
    sample: pa.Table,
    part: Audit,
    seed: int,
) -> tuple[list[Measured], float]:
    """Return HR@1 of every rule with its interval, and what chance gives."""
    sample = sample.sort_by("row")
    users = sample["user_id"].combine_chunks().dictionary_encode().indices.to_numpy(zero_copy_only=False)
    values = np.stack(list(found.values()), axis=1).astype(np.float64)
    means = clustered_means(values, users, samples=part.bootstrap_samples, confidence=part.confidence, seed=seed)
    best = int(np.argmax(means.value[: len(baselines)]))
    leads = clustered_means(
        values - values[:, [best]], users, samples=part.bootstrap_samples, confidence=part.confidence, seed=seed
    )
    bounds = np.stack([means.low, means.high, leads.low], axis=1)
    measured = []
    for place, each in enumerate([*baselines, *suspects]):
        low, high, lead_low = (None if np.isnan(bound) else float(bound) for bound in bounds[place])
        kind = BASELINE if place < len(baselines) else SUSPECT
        value = float(means.value[place])
        measured.append(Measured(each.name, kind, value, low, high, each.family, each.what, lead_low))
    lengths = pc.list_value_length(sample["candidates"]).to_numpy()
    return measured, float((1.0 / lengths).mean())


def _table(measured: list[Measured], chance: float) -> pa.Table:
    rows = [
        {**each._asdict(), "metric": "hr@1", "chance": chance, **judged._asdict()}
        for each, judged in zip(measured, judge(measured, chance=chance), strict=True)
    ]
    return pa.Table.from_pylist(rows, schema=AUDIT)


def _facts(workspace: Workspace, test: pa.Table, trained: Trained, num_items: int) -> list[Fact]:
    rows, targets = Rows.of(test), test["target"].to_numpy().astype(np.int64)
    users = _user_codes(test["user_id"], trained.names)
    train = _training_rows(workspace)
    taught = row_hashes(*_history(train), train["target"].to_numpy().astype(np.int64))
    return [
        *row_facts(rows, targets, users, trained.histories, num_items),
        *duplicate_facts(rows, targets, taught),
        *time_facts(targets, users, trained.histories, trained.log, trained.times, num_items),
    ]


def _training_rows(workspace: Workspace) -> pa.Table:
    """Return history and target of all training rows that are published, else of the alignment examples."""
    if workspace.require("sequences").part["split"] == "published":
        published = workspace.table("ingest", "published", ["split", "history", "target"])
        train = published.filter(pc.equal(published["split"], "train"))
        if train.num_rows:
            return train
    return workspace.table("sequences", "train", ["history", "target"])


def _user_codes(users: pa.ChunkedArray, names: pa.Array) -> NDArray[np.int64]:
    """Return codes of users; those of no training history or log get codes of their own, below zero."""
    codes = _codes(users, names)
    others = users.combine_chunks().dictionary_encode().indices.to_numpy(zero_copy_only=False)
    return np.where(codes >= 0, codes, -1 - others.astype(np.int64))


def _history(table: pa.Table) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    flat, lengths = flat_lists(table["history"])
    return flat.astype(np.int64), lengths


def _told(rules: pa.Table, facts: list[Fact], orders: list[Order], sample: pa.Table, num_rows: int) -> dict[str, Any]:
    """Return what the manifest says of the audit."""
    listed = rules.to_pylist()
    history, lengths = _history(sample)
    last = history[np.maximum(np.cumsum(lengths) - 1, 0)] if len(history) else np.zeros(len(lengths), dtype=np.int64)
    targets = sample["target"].to_numpy().astype(np.int64)
    shares = {order.name: ascending_share(order, last[lengths > 0], targets[lengths > 0]) for order in orders}
    return {
        "test_rows": num_rows,
        "audited_rows": sample.num_rows,
        "leaks": [rule["rule"] for rule in listed if rule["verdict"] == LEAK],
        "hr@1": {rule["rule"]: {name: rule[name] for name in ("value", "low", "high")} for rule in listed},
        "chance": listed[0]["chance"],
        "facts": {fact.fact: fact.number for fact in facts},
        "targets above the last item": {name: None if np.isnan(share) else share for name, share in shares.items()},
    }
