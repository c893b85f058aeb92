"""How long the audit takes: one million training histories and one million test rows, on two CPUs.

    python -m benchmarks.bench_audit [--quick] [--rows 20000] [--out benchmarks/results]

The workspace is made by hand from a seed: skewed popularity, timestamps, 20 candidates a row. The stage then runs as in
any run, on a local Ray. `--rows` is `audit.rows`: how many test rows the rules score. Facts are of all rows.
Memory is the sum over this process and all its descendants of what each has alone and its part of what is shared
(PSS), sampled every half second; Ray's own processes count. `cpu_s` is the processor time of the same processes: what
the seconds come near to where nothing else runs, for most of it runs in one process.
"""

import argparse
import json
import os
import platform
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from benchmarks.bench_scoring import table
from recray import schema
from recray.config import Audit, Pipeline, Resources, Sequences
from recray.stages.flow import Job
from recray.workspace import Workspace

QUIET = 0.5  # load of a machine that has nothing else to do
SAMPLED_EVERY_S = 0.5
HISTORY, CANDIDATES = 10, 20  # of a test row


class Size(NamedTuple):
    """How much is audited."""

    histories: int
    items: int
    mean_length: int  # of a training history
    test_rows: int
    validation_rows: int = 2_000


def main() -> None:
    """Make the workspace, audit it, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="20,000 sequences; to see that it runs")
    parser.add_argument("--rows", type=int, nargs="+", default=[20_000])
    parser.add_argument("--out", type=Path, help="folder for the table and the figures as JSON")
    options = parser.parse_args()
    count = 20_000 if options.quick else 1_000_000
    size = Size(count, items=count // 10, mean_length=20, test_rows=count)
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="recray-bench-") as folder:
        workspace = make(Path(folder), size, seed=0)
        rows = [audited(workspace, rows, size) for rows in options.rows]
    alone = "" if load < QUIET else f"; not alone on the machine: load {load:.1f} when it began"
    hardware = f"{platform.machine()} CPU, {os.cpu_count()} cores, 2 CPUs for Ray{alone}"
    versions = {name: __import__(name).__version__ for name in ("numpy", "pyarrow")}
    report = {"hardware": hardware, "versions": versions, "size": size._asdict(), "rows": rows}
    print(table(rows))
    if options.out:
        write(report, options.out)
    print(json.dumps(report))


def make(folder: Path, size: Size, seed: int) -> Workspace:
    """Return a workspace that holds what `ingest` and `sequences` leave behind."""
    rng = np.random.default_rng(seed)
    workspace = Workspace(str(folder))
    lengths = np.maximum(2, rng.poisson(size.mean_length, size.histories))
    users = pa.array([f"user-{user}" for user in range(size.histories)])
    items = _skewed(rng, int(lengths.sum()), size.items)
    numbers = [str(number) for number in rng.permutation(size.items)]
    titles = [f"Title {number}" for number in numbers]
    catalogue = [np.arange(size.items), numbers, titles, titles, [[]] * size.items]
    owners = np.repeat(np.arange(size.histories), lengths)
    times = np.sort(rng.integers(0, 10**8, len(items)))  # of one user ascending, as all are
    log = [users.take(pa.array(owners)), items, times, np.zeros(len(items), dtype=np.float32), times]
    with workspace.stage("ingest", version=1, part={}, seed=seed, inputs={}) as out:
        out.facts["clock"] = True
        out.write_table("items", pa.table(catalogue, schema=schema.CATALOGUE))
        out.write_table("other_ids", schema.OTHER_IDS.empty_table())
        out.write_table("interactions", pa.table(log, schema=schema.INTERACTIONS))
    part = Sequences(split="leave_one_out").model_dump(mode="json")
    with workspace.stage("sequences", version=1, part=part, seed=seed, inputs={}) as out:
        histories = [np.arange(size.histories), users, _lists(items, lengths)]
        out.write_table("histories", pa.table(histories, schema=schema.HISTORIES))
        out.write_table("validation", _evaluation(rng, users, size.validation_rows, size.items))
        test = _evaluation(rng, users, size.test_rows, size.items)
        out.write_table("test", test)
        out.write_table("train", test.slice(0, size.test_rows // 2).drop_columns(["candidates"]))
    return workspace


def _skewed(rng: np.random.Generator, count: int, num_items: int) -> np.ndarray:
    """Return items, the first far more often than the last."""
    return np.asarray((num_items * rng.random(count) ** 3).astype(np.int32))


def _lists(items: np.ndarray, lengths: np.ndarray) -> pa.ListArray:
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(items))


def _evaluation(rng: np.random.Generator, users: pa.Array, rows: int, num_items: int) -> pa.Table:
    """Return evaluation rows whose candidates differ: a random start, then equal steps through the catalogue."""
    target = _skewed(rng, rows, num_items)
    others = target[:, None] + np.arange(CANDIDATES) * rng.integers(1, num_items // CANDIDATES, rows)[:, None]
    candidates = rng.permuted((others % num_items).astype(np.int32), axis=1)
    owners = users.take(pa.array(rng.integers(0, len(users), rows)))
    history = _lists(_skewed(rng, rows * HISTORY, num_items), np.full(rows, HISTORY))
    lists = _lists(candidates.ravel(), np.full(rows, CANDIDATES))
    return pa.table([np.arange(rows), owners, history, target, lists], schema=schema.EVALUATION)


def audited(workspace: Workspace, rows: int, size: Size) -> dict[str, Any]:
    """Return the seconds, in all and by part, and the most memory of one audit of at most `rows` rows."""
    from recray.stages import audit
    from recray.stages.cluster import connect

    part = Audit(rows=rows)
    pipeline = Pipeline(name="bench", audit=part)
    with connect(Resources()), most_memory() as memory:
        started, cpu = time.monotonic(), cpu_of_tree()
        with workspace.stage("audit", version=1, part={}, seed=0, inputs={}) as out:
            audit.run(Job(part, 0, Resources(), workspace, out, "bench", pipeline))
        seconds, cpu = time.monotonic() - started, cpu_of_tree() - cpu
    facts = workspace.require("audit").facts
    return {
        "sequences": size.histories,
        "test_rows": size.test_rows,
        "scored_rows": facts["audited_rows"],
        "seconds": round(seconds, 1),
        "cpu_s": round(cpu, 1),
        **{f"{name}_s": took for name, took in facts["seconds"].items()},
        "memory_gib": round(memory[0] / 2**30, 2),
    }


@contextmanager
def most_memory() -> Iterator[list[int]]:
    """Yield a list whose one entry is, in the end, the most bytes that this process and its descendants held."""
    most, done = [0], threading.Event()

    def watch() -> None:
        while not done.wait(SAMPLED_EVERY_S):
            most[0] = max(most[0], held_by_tree())

    thread = threading.Thread(target=watch, daemon=True)
    most[0] = held_by_tree()
    thread.start()
    try:
        yield most
    finally:
        done.set()
        thread.join()


def held_by_tree() -> int:
    """Return the bytes that this process and its descendants hold now; 0 without /proc."""
    return sum(_proportional(pid) for pid in _tree())


def cpu_of_tree() -> float:
    """Return the seconds of processor time that this process and its living descendants have taken; 0 without /proc."""
    return sum(sum(map(int, fields[11:13])) for fields in _tree().values()) / os.sysconf("SC_CLK_TCK")


def _tree() -> dict[int, list[str]]:
    """Return the fields of /proc/PID/stat after the name, of this process and its descendants."""
    fields = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields[int(status.parent.name)] = status.read_text().rpartition(")")[2].split()
        except OSError:  # ended meanwhile
            continue
    tree = {os.getpid()}
    for _ in range(8):  # as deep as Ray's processes go
        tree |= {child for child, each in fields.items() if int(each[1]) in tree}
    return {pid: fields[pid] for pid in tree if pid in fields}


def _proportional(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith("Pss:"))


def write(report: dict[str, Any], folder: Path) -> None:
    """Write the figures and a table in Markdown."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = folder / f"audit_cpu{os.cpu_count()}_{datetime.now(UTC):%Y%m}"
    stem.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    head = [f"# Audit, {report['hardware']}", ""]
    size = report["size"]
    head += [
        f"{size['histories']:,} training histories of {size['mean_length']} items on average, {size['items']:,} items, "
        f"{size['test_rows']:,} test rows of {CANDIDATES} candidates. `scored_rows` is what the rules score "
        "(`audit.rows`, 20,000 by default); facts are of all rows.",
        "",
        "Made by `python -m benchmarks.bench_audit --out benchmarks/results`; one run each.",
        "",
    ]
    names = list(report["rows"][0])
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    lines += ["| " + " | ".join(f"{row[name]:,}" for name in names) + " |" for row in report["rows"]]
    stem.with_suffix(".md").write_text("\n".join([*head, *lines]) + "\n")


if __name__ == "__main__":
    main()
