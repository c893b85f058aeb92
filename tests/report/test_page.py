"""The page stands alone, escapes what users wrote, and copes with a run that is only half there."""

import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from recray.report import plots
from recray.report.page import Contents, flat_facts, render
from recray.workspace import Manifest


class Reader(HTMLParser):
    """Collects tags, attributes and whether every tag is closed in order."""

    VOID = {"meta", "br"}

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.open: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def _interval(value: float) -> dict[str, float | None]:
    return {"value": value, "low": value - 0.02, "high": value + 0.02}


def _read(page: str) -> Reader:
    reader = Reader()
    reader.feed(page)
    reader.close()
    assert reader.open == []
    return reader


def test_whole_page_shows_everything(contents: Contents) -> None:
    page = render(contents)
    text = " ".join(" ".join(_read(page).text).split())
    for part in (
        "demo",
        "can’t be told from",
        "Co-occurrence",
        "0.280–0.320",
        "Quality against popularity",
        "SASRec",
        "Supervised fine-tuning",
        "rank 1 of 20",
        "1,234",
        "never met in training: 23 of 90 rows, where NDCG@10 is Popularity 0.432",
        "0 rows, 3 items",
        "< 0.001",
        "0.032",
        "0.765",
        "reasons · duplicate",
        "2.60.0",
        "0123456789abcdef",
        '"seed": 5',
    ):
        assert part in text, part
    for row in (
        "ingest rows of the logs 5,000 4,321 600 rejected, 79 repeated",
        "sequences training interactions 3,421 3,400 21 of users below two",
        "sequences test targets 900 90 10 without history, 800 beyond targets per user",
        "evaluate test rows, by each model 180 180 none",
        "SFT 45.0 2.0",  # seconds, rows a second
        "sft ingest train 1,234 98.8 2,000 1.23 12.5",  # rows and tokens a second (the median), memory
        "sequences ingest train 1,234 – – – 12.5",  # written before costs were kept
        "SFT 0.457 0.125 0.012 0.079 0.046 0.046 Comedy +0.150 <script>",  # DivRatio, MGU, DGU at 1 and 10
        "1 of 6 items of the catalogue, 31 of 700 in the histories",
        "Aligned prior-corrected 0.5.",
        "60 of 90 test rows",
        "SFT 0.500 0.480–0.520 0.500 0.480–0.520 0.500 0.480–0.520 – ––– – ––– “<script>",  # none valid
    ):
        assert row in text, row
    assert "not accounted for" not in text
    assert "cost ·" not in text  # they have their table
    assert "NDCG@1 " not in text  # it is HR@1
    assert "Alignment" not in text  # no lines, no heading


def test_titles_and_facts_are_escaped(contents: Contents, hostile: str) -> None:
    page = render(contents)
    reader = _read(page)
    assert "script" not in reader.tags
    assert "<script" not in page
    assert hostile in "".join(reader.text)
    assert "</pre>logs" in "".join(reader.text)


def test_nothing_is_loaded_from_elsewhere(contents: Contents) -> None:
    page = render(contents)
    reader = _read(page)
    assert not {"script", "link", "img", "iframe", "object", "image", "base"} & set(reader.tags)
    for name, value in reader.attributes:
        if name in ("href", "src", "xlink:href", "action", "srcset"):
            assert (value or "").startswith("#"), (name, value)
    assert "http:" not in page
    assert "https:" not in page
    assert "@import" not in page
    assert all(found.startswith("#") for found in re.findall(r"url\(([^)]*)\)", page))


def test_ids_are_unique(contents: Contents) -> None:
    ids = [value for name, value in _read(render(contents)).attributes if name == "id"]
    assert len(ids) == len(set(ids))


def test_every_colour_a_picture_asks_for_has_a_value_in_both_schemes() -> None:
    style = Path(plots.__file__).with_name("style.css").read_text(encoding="utf-8")
    light, dark = style.split("prefers-color-scheme: dark", 1)
    for name in plots.VARIABLES.values():
        assert f"--{name}:" in light
        assert f"--{name}:" in dark


@pytest.mark.parametrize(
    "contents",
    [
        Contents(name="empty"),
        Contents(name="unknown", metrics=[{"model": "sft", "rows": 3, "users": 1, "mrr": _interval(0.5)}]),
        Contents(name="no reach", metrics=[{"model": "sft", "rows": 3, "users": 1, "ndcg@10": _interval(0.5)}]),
    ],
    ids=lambda contents: contents.name,
)
def test_a_half_run_still_has_a_page(contents: Contents) -> None:
    page = render(contents)
    assert contents.name in "".join(_read(page).text)


def test_a_stage_that_left_nothing_still_has_a_page(manifest: Callable[..., Manifest]) -> None:
    left = {name: manifest(name, counts={}, facts={}, seconds=0.0) for name in ("ingest", "sequences", "evaluate")}
    page = render(Contents(name="half", manifests=left))
    assert "Rows in, rows out" not in "".join(_read(page).text)


def test_bounds_that_are_not_known_are_dashes() -> None:
    unknown = {"value": 0.5, "low": None, "high": None}
    entry = {"model": "sft", "rows": 3, "users": 1, "ndcg@10": unknown, "average_popularity": unknown}
    page = render(Contents(name="one user", metrics=[entry]))
    assert "–––" in page
    assert "None" not in "".join(_read(page).text)


def test_facts_are_flattened() -> None:
    facts = {
        "rows": 12345,
        "rate": 0.00123456,
        "big": 123456.78,
        "on": True,
        "missing": None,
        "ndcg": {"sft": {"value": 0.5, "low": 0.4, "high": None}},
        "many": list(range(9)),
        "name": "text",
        "none": [],
    }
    assert flat_facts(facts) == [
        ("rows", "12,345"),
        ("rate", "0.001235"),
        ("big", "123,456.8"),
        ("on", "yes"),
        ("missing", "–"),
        ("ndcg · sft", "0.500 (0.400 to –)"),
        ("many", "0, 1, 2, 3, 4, 5, … (9 in all)"),
        ("name", "text"),
        ("none", "–"),
    ]


def _audit(verdict: str, hostile: str) -> list[dict[str, Any]]:
    base = {"metric": "hr@1", "low": 0.1, "high": 0.3, "chance": 0.05, "reason": "", "advice": ""}
    told = {"value": 0.9, "verdict": verdict, "reason": "More than behaviour.", "advice": hostile}
    return [
        {**base, "rule": "popularity", "kind": "baseline", "value": 0.2, "verdict": "clear"},
        {**base, "rule": "smallest id above", "kind": "suspect", **told},
    ]


@pytest.mark.parametrize("verdict", ["leak", "look"])
def test_the_audit_stands_beside_the_result_and_a_leak_above_all(verdict: str, hostile: str) -> None:
    facts = [
        {"fact": "cold targets", "number": 252, "of": 1000, "note": hostile},
        {"fact": "later training", "number": None, "of": None, "note": "no clock"},
    ]
    page = render(Contents(name="audited", audit=_audit(verdict, hostile), audit_facts=facts))
    reader = _read(page)
    text = " ".join(" ".join(reader.text).split())
    assert "smallest id above" in text
    assert "252 of 1,000" in text
    assert "not known" in text
    assert "script" not in reader.tags
    first = text.index("The evaluation leaks.") if verdict == "leak" else None
    assert (first is not None) == ("aside" in reader.tags)
    if first is not None:
        assert first < text.index("no ranking results")  # the first of the summary
