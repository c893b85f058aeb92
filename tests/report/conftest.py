"""What a whole run leaves for the page, and text that must never be taken for markup."""

from collections.abc import Callable
from typing import Any

import pytest

from recray.report import plots
from recray.report.page import Column, Contents, Example, Shown
from recray.workspace import Manifest

HOSTILE = "<script>alert('x')</script> & \"Co\""


@pytest.fixture
def hostile() -> str:
    """A title that is markup."""
    return HOSTILE


@pytest.fixture
def manifest() -> Callable[..., Manifest]:
    """Makes the manifest of a stage."""
    return _manifest


@pytest.fixture
def contents() -> Contents:
    """All that the page can show, of a made-up run."""
    names = [f"{stem}@{k}" for stem in ("hr", "ndcg") for k in (1, 5, 10, 20)] + ["mrr", "average_popularity"]
    reach = {"coverage": 0.5, "gini": 0.25, "div_ratio": 0.4567, "div_ratio@10": 0.125, "div_ratio@20": 0.1}
    metrics = [
        {"model": model, "rows": 90, "users": 9, **{name: _interval(0.3) for name in names}, **reach}
        for model in plots.MODELS
    ]
    return Contents(
        name="demo",
        manifests=_manifests(),
        metrics=metrics,
        differences=[_difference()],
        exposure=_exposure(),
        slices=[
            {
                "by": "target in training",
                "slice": "never met",
                "rows": 23,
                "of": 90,
                "users": 1,
                "models": dict.fromkeys(plots.MODELS, {"ndcg@10": {"value": 0.4321, "low": None, "high": None}}),
            }
        ],
        generation=_generation(),
        audit=_audit(),
        audit_facts=[{"fact": "cold targets", "number": 252, "of": 1000, "note": HOSTILE}],
        fits={
            "users": [{"pass": 1, "loss": 2.0}, {"pass": 2, "loss": 1.0}],
            "sft": [{"kind": "train", "step": n, "loss": 2.0 / n, "tokens_per_s": 1000.0 * n} for n in (1, 2, 3)],
            "align": [],
        },
        examples=[Example("u", ["One", HOSTILE], HOSTILE, 20, [Column("sft", 1, [Shown(HOSTILE, True)])])],
        pipeline={"name": "demo", "seed": 5, "ingest": {"data": "</pre>logs"}},
    )


def _interval(value: float) -> dict[str, float | None]:
    return {"value": value, "low": value - 0.02, "high": value + 0.02}


def _manifest(stage: str, **changes: Any) -> Manifest:
    settings: dict[str, Any] = {
        "stage": stage,
        "version": 1,
        "fingerprint": "0123456789abcdef",
        "part": {},
        "seed": 5,
        "inputs": {"ingest": "ab"},
        "counts": {"train": 1234},
        "facts": {"reasons": {"duplicate": 7}, "note": HOSTILE},
        "seconds": 12.5,
        "finished": "2026-02-03T04:05:06Z",
        "versions": {"recray": "0.1.0", "ray": "2.60.0"},
    }
    return Manifest(**{**settings, **changes})


def _manifests() -> dict[str, Manifest]:
    read = {"rows": {"read": 5000, "kept": 4321, "rejected": 600, "repeated": 79}}
    held_out = {"held_out": 900, "written": 90, "without_history": 10, "beyond_targets_per_user": 800, "users": 9}
    train = {"interactions": 3400, "interactions_of_users_below_two": 21, "users_below_two": 21, "histories": 8}
    facts = {
        "test_rows": 90,
        "seconds": {"sft": 45.0, "popularity": 0.5},
        "score": {"align": {"chosen": "prior_corrected 0.5", "validation ndcg@10": {"summed": 0.2}}},
    }
    return {
        "ingest": _manifest("ingest", inputs={"data": "x"}, facts=read | {"note": HOSTILE}),
        "sequences": _manifest("sequences", facts={"rows": {"train": train, "test": held_out, "validation": held_out}}),
        "sft": _manifest(
            "sft",
            facts={
                "note": HOSTILE,
                "reasons": {"duplicate": 7},
                "cost": {"rows_per_s": 98.76, "peak_memory_gib": 1.234},
            },
        ),
        "evaluate": _manifest("evaluate", facts=facts, counts={"rows": 180}),
    }


def _difference() -> dict[str, Any]:
    test = {"measure": "ndcg@10", "comparisons": 1, "flips": 9999, "p": 0.0004, "p_holm": 0.0321}
    return {"model": "aligned", "minus": "sft", "rows": 90, "users": 9, "ndcg@10": _interval(0.0), "test": test}


def _exposure() -> dict[str, Any]:
    shares = [0.2, 0.2, 0.2, 0.2, 0.2]
    first = {"k": 1, "mgu": 0.0123, "dgu": 0.0456, "items": 90, "without_genre": 2, "shares": [0.25, 0.75]}
    more = {**first, "k": 10, "mgu": 0.0789, "shares": [0.55, 0.45]}
    return {
        "groups": ["a", "b", "c", "d", "e"],
        "models": dict.fromkeys(plots.MODELS, shares),
        "chosen": shares,
        "chosen_average_popularity": 3.0,
        "bands": {
            "k": 10,
            "bands": ["head", "mid", "tail"],
            "items": [1, 2, 3],
            "rows": [40, 50, 0],
            "models": {"sft": {"hit_rates": [0.7654, 0.1, None], "balance": None}},
        },
        "genres": {
            "genres": ["Comedy", HOSTILE],
            "met": {"items": 700, "without_genre": 31, "shares": [0.4, 0.6]},
            "catalogue": {"items": 6, "without_genre": 1},
            "chosen": {**first, "mgu": None, "dgu": None},
            "models": {"sft": [first, more]},
        },
    }


def _generation() -> dict[str, Any]:
    shares = {name: _interval(0.5) for name in ("valid_ratio", "in_candidates", "ended", "hr@1")}
    invalid = [{"text": HOSTILE, "ended": True, "rows": 12}]
    own = {"model": "sft", "template": "titles", "seconds": 3.0, "rows": 60, "users": 9, **shares, "invalid": invalid}
    unknown = {"value": None, "low": None, "high": None, "rows": 0}
    return {"rows": 60, "of": 90, "models": [{**own, "hr@1 of valid": unknown, "hr@1 of candidates": unknown}]}


def _audit() -> list[dict[str, Any]]:
    base = {"metric": "hr@1", "low": 0.1, "high": 0.3, "chance": 0.05, "reason": "", "advice": ""}
    return [
        {**base, "rule": "popularity", "kind": "baseline", "value": 0.2, "verdict": "clear"},
        {**base, "rule": "nearest id", "kind": "suspect", "value": 0.9, "verdict": "leak", "advice": HOSTILE},
    ]
