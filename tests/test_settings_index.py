"""The index of settings tells what the models say, and docs/settings.md is what it tells now."""

import subprocess
import sys
from pathlib import Path

import pytest

from recray.config import Negatives, Pipeline, Sft, setting_names
from recray.objectives import registry
from recray.settings_index import Setting, markdown, sections

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def index() -> dict[str, Setting]:
    return {setting.key: setting for section in sections() for setting in section.settings}


def test_every_setting_is_there_once_and_says_what_it_means(index: dict[str, Setting]) -> None:
    assert len(index) == sum(len(section.settings) for section in sections())
    known = set(setting_names())
    groups = {name for name in known if any(other.startswith(f"{name}.") for other in known)}
    assert known - groups <= set(index) <= known
    assert [key for key, setting in index.items() if not setting.meaning] == []


def test_a_setting_tells_default_type_bounds_and_unit(index: dict[str, Setting]) -> None:
    assert index["align.steps"][1:4] == ("`200`", "integer ≥ 1", "steps")
    assert index["align.seconds"][1:4] == ("`null`", "number > 0 or null", "s")
    assert index["sequences.test_fraction"][1:4] == ("`0.1`", "number > 0 and < 1", "share")
    assert index["evaluate.ks"][1:4] == ("`[1, 5, 10, 20]`", "list of integer ≥ 1", "rank")
    assert index["seed"].default == "`0`"
    assert index["name"].default == "–"
    assert index["ingest.columns.user"].default == "`user_id`"


def test_a_group_in_two_places_has_the_defaults_of_its_place(index: dict[str, Setting]) -> None:
    own = [str(part.optimiser.learning_rate) for part in (Sft(), Pipeline(name="x").align)]
    assert [index[f"{part}.optimiser.learning_rate"].default.strip("`") for part in ("sft", "align")] == own
    assert own[0] != own[1]
    assert index["align.lora"].default == "`null`"
    assert index["align.lora.rank"].default == "`16`"  # what it is once there is an adapter


def test_a_setting_holds_for_the_choices_that_do_not_refuse_it(index: dict[str, Setting]) -> None:
    for name in Negatives.model_fields:
        samplers = [each for each, own in Negatives.samplers().items() if name in own]
        told = index[f"negatives.{name}"].holds
        assert told == (f"Holds for sampler {', '.join(samplers)}." if name not in ("sampler", "num") else "")
    assert index["users.exponent"].holds == ("Holds for loss sampled_softmax; sampler popularity, inverse_popularity.")


def test_objectives_tell_their_settings_and_their_own_defaults(index: dict[str, Setting]) -> None:
    assert index["align.objective.smoothing"].holds == "Holds for rosepo."
    assert index["align.objective.beta"].holds == "Holds for all but sft."
    assert index["align.objective.beta"].default == "`1.0`; simpo `2.0`"
    assert index["align.objective.guard"].holds.startswith("Holds for napo; with `reuse=item` for sdpo,")
    having = {name for objective in registry.OBJECTIVES for name in registry.every_setting_of(objective)}
    told = {key.rpartition(".")[2]: setting.holds for key, setting in index.items() if "objective." in key}
    assert {name for name, holds in told.items() if holds} == having == set(told) - {"name"}
    assert told["reuse_items"].startswith("Holds with `reuse=item` for napo,")
    assert "; with both for sdpo," in told["guard_threshold"]


def test_a_part_says_which_stages_run_again() -> None:
    page = markdown(
        {"one": (), "two": ("one",), "align": ("one",), "three": ("two", "align")},
        {**dict.fromkeys(["one", "align", "three"], ()), "two": ("evaluate",)},
    )
    told = {part.partition("`\n")[0]: part for part in page.split("## `")[1:]}
    assert "Acts in `align`; a change also runs again `three`." in told["align"]
    assert "Acts in `two`; a change also runs again `three`." in told["evaluate"]
    assert "Acts in every stage that runs." in told["resources"]
    assert "\\|N_i\\|" in page  # a bar would end the cell


def test_the_page_is_that_of_the_models() -> None:
    command = [sys.executable, "-m", "recray", "settings"]
    told = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout
    page = (ROOT / "docs" / "settings.md").read_text(encoding="utf-8")
    assert told == page, "docs/settings.md is out of date: run `make settings`"


def test_no_setting_holds_under_no_choice(index: dict[str, Setting]) -> None:
    assert [key for key, setting in index.items() if setting.holds.endswith("for .")] == []
