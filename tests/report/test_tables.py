"""Numbers as they are written, and the tables in the terminal."""

import io

import pytest
from rich.console import Console
from rich.table import Table

from recray.report import tables
from recray.report.tables import (
    differences_table,
    headline_measure,
    in_order,
    rank_measures,
    results_table,
    slices_table,
)

INTERVAL = {"value": 0.5, "low": 0.45, "high": 0.57}
UNKNOWN = {"value": 0.5, "low": None, "high": None}
ENTRY = {
    "model": "sft",
    "rows": 1200,
    "users": 40,
    "hr@1": INTERVAL,
    "hr@10": INTERVAL,
    "ndcg@5": INTERVAL,
    "ndcg@10": INTERVAL,
    "mrr": UNKNOWN,
    "average_popularity": {"value": 1234.5, "low": 1.0, "high": 2.0},
    "coverage": 0.125,
}


def _text(table: Table, width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(table)
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (tables.plain(1234.5678, 1), "1,234.6"),
        (tables.plain(None), "–"),
        (tables.plain(float("nan")), "–"),
        (tables.signed(-0.0123), "−0.012"),
        (tables.signed(0.5), "+0.500"),
        (tables.signed(None), "–"),
        (tables.with_margin(INTERVAL), "0.500 ±0.060"),
        (tables.with_margin(UNKNOWN), "0.500"),
        (tables.signed_with_interval(INTERVAL), "+0.500\n[+0.450, +0.570]"),
        (tables.signed_with_interval(UNKNOWN), "+0.500"),
        (tables.measure_name("ndcg@10"), "NDCG@10"),
        (tables.measure_name("mrr"), "MRR"),
        (tables.model_name("cooccurrence"), "Co-occurrence"),
        (tables.model_name("mine"), "mine"),
    ],
)
def test_numbers_and_names(found: str, expected: str) -> None:
    assert found == expected


def test_headline_is_the_ndcg_nearest_to_ten() -> None:
    assert headline_measure([ENTRY]) == "ndcg@10"
    assert headline_measure([{"ndcg@1": INTERVAL, "ndcg@20": INTERVAL, "hr@10": INTERVAL}]) == "ndcg@1"
    assert headline_measure([{"hr@10": INTERVAL}]) is None
    assert headline_measure([]) is None


def test_results_fit_eighty_columns() -> None:
    text = _text(results_table([ENTRY], confidence=0.95))
    for part in ("SFT", "HR@1", "NDCG@10", "0.500 ±0.060", "1,234", "12.5 %", "1,200 rows of 40 users", "95 %"):
        assert part in text
    assert "…" not in text


def test_differences_fit_eighty_columns() -> None:
    pair = {**ENTRY, "model": "sft", "minus": "cooccurrence"}
    text = _text(differences_table([pair], confidence=0.9))
    tested = _text(differences_table([{**pair, "test": {"measure": "ndcg@10", "p_holm": 0.0004}}], confidence=0.9))
    assert "< 0.001" in tested
    assert "…" not in tested
    for part in ("SFT − Co-occurrence", "+0.500", "[+0.450, +0.570]", "90 %"):
        assert part in text
    assert "…" not in text


def test_nothing_evaluated_gives_an_empty_table() -> None:
    assert "model" in _text(results_table([], confidence=0.95))


def test_slices_fit_eighty_columns() -> None:
    models = dict.fromkeys(("popularity", "cooccurrence", "sasrec", "sft", "aligned"), ENTRY)
    part = {"by": "popularity of the target", "slice": "head", "rows": 1200, "of": 2000, "users": 9, "models": models}
    text = _text(slices_table([part], confidence=0.9))
    assert max(map(len, text.splitlines())) <= 80
    assert text.count("0.500") == 5
    assert "1,200" in text
    assert "NDCG@10; ± half the 90 % interval" in text
    assert "By part" in _text(slices_table([], confidence=0.9))


def test_measures_and_models_come_in_one_order_wherever_they_were_written() -> None:
    names = ("hr@1", "hr@10", "hr@20", "hr@5", "mrr", "ndcg@10", "ndcg@5", "coverage")
    entry = {name: {"value": 0.1} for name in names}
    assert rank_measures([entry]) == ["hr@1", "hr@5", "hr@10", "hr@20", "ndcg@5", "ndcg@10", "mrr"]
    models = ["aligned", "cooccurrence", "dpo", "popularity", "sft"]
    assert in_order(models) == ["popularity", "cooccurrence", "sft", "aligned", "dpo"]
