"""Accounts add up, or say that they don't."""

from collections.abc import Callable

import pytest

from recray.report.accounts import accounts, rankings, tokens_per_s
from recray.report.page import Contents, render
from recray.workspace import Manifest

Make = Callable[..., Manifest]


def test_rows_that_no_reason_tells_of_are_lost_and_shown(manifest: Make) -> None:
    rows = {"read": 100, "kept": 60, "rejected": 30, "repeated": 0}
    manifests = {"ingest": manifest("ingest", facts={"rows": rows})}
    (found,) = accounts(manifests)
    assert (found.came, found.went_on, found.aside, found.lost) == (100, 60, [("rejected", 30)], 10)
    assert "10 not accounted for" in render(Contents(name="lossy", manifests=manifests))


def test_a_row_that_a_model_did_not_rank_is_lost(manifest: Make) -> None:
    facts = {"test_rows": 50, "seconds": {"sft": 10.0, "sasrec": 2.0}}
    (found,) = accounts({"evaluate": manifest("evaluate", facts=facts, counts={"rows": 99})})
    assert (found.came, found.went_on, found.lost) == (100, 99, 1)


def test_users_and_cold_targets_are_no_reason(manifest: Make) -> None:
    own = {"held_out": 9, "written": 5, "without_history": 4, "users": 3, "cold_targets": 2}
    (found,) = accounts({"sequences": manifest("sequences", facts={"rows": {"test": own}})})
    assert (found.rows, found.aside, found.lost) == ("test targets", [("without history", 4)], 0)


def test_what_is_not_there_is_not_told(manifest: Make) -> None:
    manifests = {stage: manifest(stage, facts={"rows": 7}) for stage in ("ingest", "sequences", "evaluate")}
    assert accounts(manifests) == accounts({}) == rankings(manifests) == rankings({}) == []


def test_rows_a_second_of_the_fastest_first(manifest: Make) -> None:
    facts = {"test_rows": 50, "seconds": {"sft": 10.0, "sasrec": 2.0}}
    found = rankings({"evaluate": manifest("evaluate", facts=facts)})
    assert [(each.model, each.rows_per_s) for each in found] == [("sasrec", 25.0), ("sft", 5.0)]


@pytest.mark.parametrize(("speeds", "expected"), [([5.0, 900.0, None, 7.0], 7.0), ([None], None), ([], None)])
def test_tokens_a_second_are_the_median_step(speeds: list[float | None], expected: float | None) -> None:
    lines = [{"kind": "train", "step": 1, **({} if each is None else {"tokens_per_s": each})} for each in speeds]
    assert tokens_per_s(lines) == expected
