"""The report: one HTML page that stands alone, from plain data."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from recray.ranking.verdicts import leaks
from recray.report import plots, tables
from recray.report.accounts import accounts, rankings, tokens_per_s
from recray.report.findings import audit_sentence, cold_sentence, findings, summary
from recray.report.variety import shown_ks, varieties
from recray.workspace import Manifest

MOST_FACTS = 24  # of a stage, on the page; the manifest has them all

# Facts that the page shows in a table of their own, by the start of their names.
SHOWN_APART = {
    "audit": ("hr@1", "facts", "leaks"),
    "evaluate": ("ndcg@", "p after Holm", "targets never met", "seconds"),
}

FIT_NAMES = {"users": "SASRec", "sft": "Supervised fine-tuning", "align": "Alignment"}


@dataclass(frozen=True)
class Shown:
    """One recommended item of an example."""

    title: str
    is_target: bool


@dataclass(frozen=True)
class Column:
    """What one model showed for an example, best first."""

    model: str
    rank: int
    shown: list[Shown]


@dataclass(frozen=True)
class Example:
    """One test row: what the user had met, what came next, what each model showed."""

    user_id: str
    history: list[str]  # titles, the latest last
    target: str
    num_candidates: int
    columns: list[Column]


@dataclass(frozen=True)
class Contents:
    """All that the page shows; anything but the name may be missing."""

    name: str
    manifests: Mapping[str, Manifest] = field(default_factory=dict)  # in the order of the run
    metrics: Sequence[tables.Entry] = ()
    differences: Sequence[tables.Entry] = ()
    exposure: Mapping[str, Any] | None = None
    slices: Sequence[tables.Entry] = ()  # `evaluate/slices.json`
    generation: Mapping[str, Any] | None = None  # `evaluate/generation.json`
    audit: Sequence[Mapping[str, Any]] = ()  # rows of `schema.AUDIT`
    audit_facts: Sequence[Mapping[str, Any]] = ()  # `audit/facts.json`
    fits: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)  # metrics lines by stage
    examples: Sequence[Example] = ()
    pipeline: Mapping[str, Any] = field(default_factory=dict)
    confidence: float = 0.95


def render(contents: Contents) -> str:
    """Return the page.

    Nothing on it is loaded from elsewhere: style and pictures are inside. All text is escaped, titles of a catalogue
    above all.
    """
    genres = None if contents.exposure is None else contents.exposure.get("genres")
    return (
        templates()
        .get_template("page.html")
        .render(
            contents=contents,
            summary=summary(contents.metrics, contents.differences, confidence=contents.confidence),
            findings=findings(contents.differences, confidence=contents.confidence),
            leaks=leaks(contents.audit),
            audited=audit_sentence(contents.audit),
            cold=cold_sentence(contents.slices),
            slice_measure=tables.slice_measure(contents.slices),
            bands=None if contents.exposure is None else contents.exposure.get("bands"),
            genres=genres,
            variety_ks=shown_ks(contents.metrics, genres),
            varieties=varieties(contents.metrics, genres),
            scores=_scores(contents.manifests),
            measures=_table_measures(contents.metrics),
            pictures=_pictures(contents),
            fits=_fits(contents),
            accounts=accounts(contents.manifests),
            rankings=rankings(contents.manifests),
            stages=_stages(contents),
            total_seconds=sum(manifest.seconds for manifest in contents.manifests.values()),
            versions=_versions(contents.manifests),
            configuration=json.dumps(contents.pipeline, indent=2, ensure_ascii=False),
        )
    )


def templates() -> Environment:
    """Return what pages are made with: all text escaped, numbers and names written as everywhere."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "plain": tables.plain,
        "signed": tables.signed,
        "p_value": tables.p_value,
        "model": tables.model_name,
        "in_order": tables.in_order,
        "measure": tables.measure_name,
    }
    return environment


def flat_facts(facts: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Return facts as (name, text) pairs: groups by dotted names, intervals in one line, long lists by their length."""
    pairs: list[tuple[str, str]] = []
    for key, value in facts.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value.keys() == {"value", "low", "high"}:
            low, high = tables.plain(value["low"]), tables.plain(value["high"])
            pairs.append((name, f"{tables.plain(value['value'])} ({low} to {high})"))
        elif isinstance(value, Mapping):
            pairs += flat_facts(value, f"{name} · ")
        else:
            pairs.append((name, _text(value)))
    return pairs


def _text(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "–"}[value]
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.1f}" if abs(value) >= 1000 else f"{value:.4g}".replace("-", "−")
    if isinstance(value, list):
        texts = [_text(each) for each in value[:6]]
        return ", ".join(texts) + (f", … ({len(value)} in all)" if len(value) > 6 else "") or "–"
    return str(value)


def _table_measures(metrics: Sequence[tables.Entry]) -> list[str]:
    """Return the ranking measures of the page's table; NDCG@1 is HR@1 and left out."""
    return [name for name in tables.rank_measures(metrics) if name != "ndcg@1"]


def _pictures(contents: Contents) -> dict[str, Markup | None]:
    exposure = contents.exposure
    chosen = None if exposure is None else exposure.get("chosen_average_popularity")
    drawn = {
        "differences": plots.difference_picture(contents.differences),
        "popularity": plots.popularity_picture(contents.metrics, chosen),
        "exposure": None if exposure is None else plots.exposure_picture(exposure),
    }
    # Drawn by us from numbers and fixed names: no text of a user's is in them.
    return {name: None if svg is None else Markup(svg) for name, svg in drawn.items()}


def _fits(contents: Contents) -> list[tuple[str, list[tuple[str, Markup]]]]:
    found = []
    for stage, lines in contents.fits.items():
        name = FIT_NAMES.get(stage, stage)
        panels = [(panel.title, Markup(panel.svg)) for panel in plots.curve_panels(lines, fit=name)]
        if panels:
            found.append((name, panels))
    return found


def _scores(manifests: Mapping[str, Manifest]) -> list[tuple[str, str]]:
    """Return (model, form of the score it ranks by) of the language models, where evaluate chose one."""
    chosen = manifests["evaluate"].facts.get("score", {}) if "evaluate" in manifests else {}
    names = {"sft": "sft", "align": "aligned"}
    return [(tables.model_name(names.get(stage, stage)), _words(each["chosen"])) for stage, each in chosen.items()]


def _words(name: str) -> str:
    return name.replace("_", "-")


def _stages(contents: Contents) -> list[dict[str, Any]]:
    manifests = contents.manifests
    longest = max((manifest.seconds for manifest in manifests.values()), default=0.0)
    stages = []
    for name, manifest in manifests.items():
        apart = ("cost", *SHOWN_APART.get(name, ()))
        facts = flat_facts({fact: value for fact, value in manifest.facts.items() if not fact.startswith(apart)})
        cost = manifest.facts.get("cost", {})
        stages.append(
            {
                "name": name,
                "reads": [source for source in manifest.inputs if source in manifests],
                "counts": manifest.counts,
                "seconds": manifest.seconds,
                "rows_per_s": cost.get("rows_per_s"),
                "tokens_per_s": tokens_per_s(contents.fits.get(name, ())),
                "peak_memory_gib": cost.get("peak_memory_gib"),
                "share": 100 * manifest.seconds / longest if longest else 0.0,
                "facts": facts[:MOST_FACTS],
                "more_facts": max(0, len(facts) - MOST_FACTS),
                "fingerprint": manifest.fingerprint,
                "version": manifest.version,
                "seed": manifest.seed,
                "finished": manifest.finished,
            }
        )
    return stages


def _versions(manifests: Mapping[str, Manifest]) -> list[tuple[str, str]]:
    """Return each library with its version, or all versions where stages ran under several."""
    found: dict[str, list[str]] = {}
    for manifest in manifests.values():
        for library, version in manifest.versions.items():
            if version not in found.setdefault(library, []):
                found[library].append(version)
    return [(library, ", ".join(versions)) for library, versions in found.items()]
