"""The page stands alone, escapes what users wrote, and copes with a run that is only half there."""

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from recray.report import plots
from recray.report.page import Column, Contents, Example, Shown, flat_facts, render
from recray.workspace import Manifest

HOSTILE = "<script>alert('x')</script> & \"Co\""


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


def _contents() -> Contents:
    names = ("hr@1", "ndcg@1", "ndcg@10", "mrr", "average_popularity")
    metrics = [
        {"model": model, "rows": 90, "users": 9, "coverage": 0.5, **{name: _interval(0.3) for name in names}}
        for model in plots.MODELS
    ]
    shares = [0.2, 0.2, 0.2, 0.2, 0.2]
    return Contents(
        name="demo",
        manifests={"ingest": _manifest("ingest", inputs={"data": "x"}), "sft": _manifest("sft")},
        metrics=metrics,
        differences=[
            {
                "model": "aligned",
                "minus": "sft",
                "rows": 90,
                "users": 9,
                "ndcg@10": _interval(0.0),
                "test": {"measure": "ndcg@10", "comparisons": 1, "flips": 9999, "p": 0.0004, "p_holm": 0.0321},
            }
        ],
        exposure={
            "groups": ["a", "b", "c", "d", "e"],
            "models": {"sft": shares},
            "chosen": shares,
            "chosen_average_popularity": 3.0,
            "bands": {
                "k": 10,
                "bands": ["head", "mid", "tail"],
                "items": [1, 2, 3],
                "rows": [40, 50, 0],
                "models": {"sft": {"hit_rates": [0.7654, 0.1, None], "balance": None}},
            },
        },
        slices=[
            {
                "by": "target in training",
                "slice": "never met",
                "rows": 23,
                "of": 90,
                "users": 1,
                "models": {"sft": {"ndcg@10": {"value": 0.4321, "low": None, "high": None}}},
            }
        ],
        fits={
            "users": [{"pass": 1, "loss": 2.0}, {"pass": 2, "loss": 1.0}],
            "sft": [{"kind": "train", "step": 1, "loss": 2.0}, {"kind": "train", "step": 2, "loss": 1.0}],
            "align": [],
        },
        examples=[Example("u", ["One", HOSTILE], HOSTILE, 20, [Column("sft", 1, [Shown(HOSTILE, True)])])],
        pipeline={"name": "demo", "seed": 5, "ingest": {"data": "</pre>logs"}},
    )


def _read(page: str) -> Reader:
    reader = Reader()
    reader.feed(page)
    reader.close()
    assert reader.open == []
    return reader


def test_whole_page_shows_everything() -> None:
    page = render(_contents())
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
        "never met in training: 23 of 90 rows, where NDCG@10 is SFT 0.432",
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
    assert "NDCG@1 " not in text  # it is HR@1
    assert "Alignment" not in text  # no lines, no heading


def test_titles_and_facts_are_escaped() -> None:
    page = render(_contents())
    reader = _read(page)
    assert "script" not in reader.tags
    assert "<script" not in page
    assert HOSTILE in "".join(reader.text)
    assert "</pre>logs" in "".join(reader.text)


def test_nothing_is_loaded_from_elsewhere() -> None:
    page = render(_contents())
    reader = _read(page)
    assert not {"script", "link", "img", "iframe", "object", "image", "base"} & set(reader.tags)
    for name, value in reader.attributes:
        if name in ("href", "src", "xlink:href", "action", "srcset"):
            assert (value or "").startswith("#"), (name, value)
    assert "http:" not in page
    assert "https:" not in page
    assert "@import" not in page
    assert all(found.startswith("#") for found in re.findall(r"url\(([^)]*)\)", page))


def test_ids_are_unique() -> None:
    ids = [value for name, value in _read(render(_contents())).attributes if name == "id"]
    assert len(ids) == len(set(ids))


def test_every_colour_a_picture_asks_for_has_a_value_in_both_schemes() -> None:
    style = Path(plots.__file__).with_name("page.html").read_text(encoding="utf-8")
    light, dark = style.split("prefers-color-scheme: dark", 1)
    for name in plots.VARIABLES.values():
        assert f"--{name}:" in light
        assert f"--{name}:" in dark


@pytest.mark.parametrize(
    "contents",
    [
        Contents(name="empty"),
        Contents(name="half", manifests={"ingest": _manifest("ingest", counts={}, facts={}, seconds=0.0)}),
        Contents(name="unknown", metrics=[{"model": "sft", "rows": 3, "users": 1, "mrr": _interval(0.5)}]),
        Contents(name="no reach", metrics=[{"model": "sft", "rows": 3, "users": 1, "ndcg@10": _interval(0.5)}]),
    ],
    ids=lambda contents: contents.name,
)
def test_a_half_run_still_has_a_page(contents: Contents) -> None:
    page = render(contents)
    assert contents.name in "".join(_read(page).text)


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
    ]


def _audit(verdict: str) -> list[dict[str, Any]]:
    base = {"metric": "hr@1", "low": 0.1, "high": 0.3, "chance": 0.05, "reason": "", "advice": ""}
    told = {"value": 0.9, "verdict": verdict, "reason": "More than behaviour.", "advice": HOSTILE}
    return [
        {**base, "rule": "popularity", "kind": "baseline", "value": 0.2, "verdict": "clear"},
        {**base, "rule": "smallest id above", "kind": "suspect", **told},
    ]


@pytest.mark.parametrize("verdict", ["leak", "look"])
def test_the_audit_stands_beside_the_result_and_a_leak_above_all(verdict: str) -> None:
    facts = [
        {"fact": "cold targets", "number": 252, "of": 1000, "note": HOSTILE},
        {"fact": "later training", "number": None, "of": None, "note": "no clock"},
    ]
    page = render(Contents(name="audited", audit=_audit(verdict), audit_facts=facts))
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
