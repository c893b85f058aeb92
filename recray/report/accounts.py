"""Where rows went and what a run cost, by its manifests: a row that came in is passed on, or set aside for a reason."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from recray.workspace import Manifest

# Of an account of evaluation rows: what is no reason to set a row aside.
_NOT_A_REASON = {"held_out", "written", "users", "cold_targets"}


class Account(NamedTuple):
    """Rows that one step was given, and where they went."""

    stage: str
    rows: str  # of what
    came: int
    went_on: int
    aside: list[tuple[str, int]]  # by reason; those with none left out
    lost: int  # that no reason tells of: a fault


class Ranking(NamedTuple):
    """What it took one model to rank the test rows."""

    model: str
    seconds: float
    rows_per_s: float


def accounts(manifests: Mapping[str, Manifest]) -> list[Account]:
    """Return the accounts of `ingest`, `sequences` and `evaluate`, as far as their facts hold them."""
    found = []
    rows = _rows(manifests, "ingest")
    if rows.keys() >= {"read", "kept"}:
        aside = {reason: count for reason, count in rows.items() if reason not in ("read", "kept")}
        found.append(_account("ingest", "rows of the logs", rows["read"], rows["kept"], aside))
    splits = _rows(manifests, "sequences")
    train = splits.get("train", {})
    if "interactions" in train:
        aside = {"of users below two": train.get("interactions_of_users_below_two", 0)}
        came = train["interactions"] + sum(aside.values())
        found.append(_account("sequences", "training interactions", came, train["interactions"], aside))
    for split in ("validation", "test"):
        own = splits.get(split, {})
        if own.keys() >= {"held_out", "written"}:
            aside = {reason: count for reason, count in own.items() if reason not in _NOT_A_REASON}
            found.append(_account("sequences", f"{split} targets", own["held_out"], own["written"], aside))
    evaluated = manifests.get("evaluate")
    if evaluated is not None and {"test_rows", "seconds"} <= evaluated.facts.keys():
        came = evaluated.facts["test_rows"] * len(evaluated.facts["seconds"])
        found.append(_account("evaluate", "test rows, by each model", came, evaluated.counts.get("rows", 0), {}))
    return found


def rankings(manifests: Mapping[str, Manifest]) -> list[Ranking]:
    """Return how long each model took to rank the test rows, the start of its processes included; fastest first."""
    evaluated = manifests.get("evaluate")
    if evaluated is None or "test_rows" not in evaluated.facts:
        return []
    rows, seconds = evaluated.facts["test_rows"], evaluated.facts.get("seconds", {})
    found = [Ranking(model, took, rows / took if took else float("nan")) for model, took in seconds.items()]
    return sorted(found, key=lambda ranking: ranking.seconds)


def tokens_per_s(lines: Sequence[Mapping[str, Any]]) -> float | None:
    """Return the median of the steps of a fit; None where its metrics lines do not hold it."""
    found = [line["tokens_per_s"] for line in lines if line.get("tokens_per_s") is not None]
    return statistics.median(found) if found else None


def _rows(manifests: Mapping[str, Manifest], stage: str) -> dict[str, Any]:
    manifest = manifests.get(stage)
    rows = {} if manifest is None else manifest.facts.get("rows", {})
    return rows if isinstance(rows, dict) else {}


def _account(stage: str, rows: str, came: int, went_on: int, aside: Mapping[str, int]) -> Account:
    reasons = [(reason.replace("_", " "), count) for reason, count in aside.items() if count]
    return Account(stage, rows, came, went_on, reasons, came - went_on - sum(aside.values()))
