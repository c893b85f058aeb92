"""An objective's settings: its own where it needs some, checked and listed without torch."""

import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from pipelines.recipes import RECIPES
from recray.config import Objective, Pipeline, override, setting_names
from recray.errors import ConfigError
from recray.objectives import registry
from recray.objectives.registry import OBJECTIVES, OPTIONS, YOUNGER, Line, Setting, names, own_settings, settings_of
from recray.workspace import fingerprint

PIPELINE = Pipeline(name="test")
ROOT = Path(__file__).parents[2]


def laid(*settings: str, over: Pipeline = PIPELINE) -> Objective:
    return override(over, settings=[f"align.objective.{setting}" for setting in settings]).align.objective


@pytest.mark.parametrize("name", names())
def test_what_is_written_down_is_what_the_objective_reads_and_can_be_read_again(name: str) -> None:
    objective = Objective(name=name)
    written = objective.model_dump(mode="json")
    assert {"name"} <= written.keys() <= {"name", *settings_of(name)}
    assert written.keys() >= {"name", *settings_of(name)} - OPTIONS.keys() - set(YOUNGER)
    assert Objective.model_validate(written) == objective
    assert pickle.loads(pickle.dumps(objective)) == objective


@pytest.mark.parametrize(
    "settings",
    [
        {"reuse": "item", "reuse_items": 3},
        {"name": "sdpo", "reuse": "item", "sharing_fraction": 0.2, "guard_near": "mask", "guard_own": True},
        {"guard_near": "shrink", "guard_threshold": -0.3},
    ],
)
def test_what_is_borrowed_is_written_down_where_it_is_chosen(settings: dict[str, object]) -> None:
    objective = Objective(**settings)
    written = objective.model_dump(mode="json")
    assert settings.items() <= written.items()
    assert Objective.model_validate(written) == objective
    assert objective.settings.keys() >= written.keys() - {"name"}


def test_borrowed_items_need_reference_scores_that_a_table_does_not_have() -> None:
    item = ["align.objective.reuse=item"]
    with pytest.raises(ConfigError, match=r"napo: reuse=item scores.*reference.source=adapter_off"):
        override(PIPELINE, settings=item)
    with pytest.raises(ConfigError, match=r"sdpo reuse=item: reuse=item scores"):
        override(PIPELINE, settings=['compare.objectives=["napo", "sdpo reuse=item"]'])
    assert override(PIPELINE, settings=[*item, "align.objective.reference=false"]).align.objective.reuses_items
    assert override(PIPELINE, settings=[*item, "reference.source=frozen_copy"]).align.objective.reuses_items
    assert override(PIPELINE, settings=[*item, "align.objective.name=bpr"]).align.objective.reuses_items


def test_an_objective_has_its_own_defaults() -> None:
    assert (laid("name=simpo").beta, laid("name=simpo").length_normalised) == (2.0, True)
    assert laid("name=cpo").nll_weight == 1.0
    assert laid("name=cpo", "nll_weight=0").nll_weight == 0.0
    assert Objective(name="cpo", nll_weight=0).model_dump()["nll_weight"] == 0.0
    assert laid("name=dpo").nll_weight == 0.0


def test_a_control_learns_from_the_policy_alone() -> None:
    """With a reference cross-entropy over the candidates would be S-DPO to the last bit, and control nothing."""
    assert [Objective(name=name).uses_reference for name in ("sdpo", "cross_entropy", "bpr")] == [True, False, False]


def test_under_another_objective_what_was_asked_for_stays_and_defaults_change() -> None:
    asked = override(PIPELINE, settings=["align.objective.beta=0.3", "align.objective.margin=none"])
    assert laid("name=simpo", over=asked).beta == 0.3
    assert laid("name=simpo", over=PIPELINE).beta == 2.0
    assert laid("name=sdpo", "beta=0.1", over=asked).model_dump()["beta"] == 0.1
    released = RECIPES["napo_as_released"].make()
    assert laid("name=dpo", over=released).model_dump() == {"name": "dpo", "beta": 1.0, "reference": False}


@pytest.mark.parametrize("order", [1, -1])
def test_settings_of_an_objective_may_come_before_its_name(order: int) -> None:
    assert laid(*["name=simpo", "target_margin=0.4"][::order]).model_dump()["target_margin"] == 0.4


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["name=simpo", "margin_base=2"], ["margin_base: not a setting of simpo", "align.objective.target_margin"]),
        (["target_margin=2"], ["target_margin: not a setting of napo", "align.objective.margin"]),
        (["name=sdpo", "guard=true"], ["guard: not a setting of sdpo"]),
        (["name=sft", "beta=2"], ["beta: not a setting of sft", "align.objective.name"]),
        (["name=rodpo", "poolsize=2"], ["poolsize: unknown setting", "align.objective.pool_size"]),
        (["name=sipo"], ["align.objective.name", "'simpo'", "cross_entropy"]),
        (["name=rosepo", "smoothing=0.6"], ["align.objective.smoothing", "less than or equal to 0.5"]),
        (["name=rodpo", "preference_weight=0"], ["align.objective.preference_weight", "greater than 0"]),
        (["name=rodpo", "pool_size=1.5"], ["align.objective.pool_size", "integer"]),
        (["name=simpo", "boundary=true", "gap_weight=2"], ["boundary: not a", "gap_weight: not a"]),
        (["name=dpo", "reuse=item"], ["reuse: not a setting of dpo"]),
        (["reuse_items=4"], ["reuse_items: not a setting of napo as it is set here"]),
        (["name=sdpo", "guard_near=mask"], ["guard_near: not a setting of sdpo as it is set here"]),
        (["guard_threshold=-0.3"], ["guard_threshold: not a setting of napo as it is set here"]),
        (["guard_near=mask", "guard_threshold=0.6"], ["guard_threshold", "less than or equal to 0.5"]),
        (["name=sdpo", "reuse=item", "sharing=none"], ["align.objective.reuse: item needs users who lend"]),
        (["guard_near=shrink", "margin=none"], ["align.objective.guard_near: shrink needs a margin"]),
        (["name=sdpo", "reuse=item", "guard_near=shrink"], ["align.objective.guard_near: shrink needs a margin"]),
    ],
)
def test_what_an_objective_does_not_have_is_refused_with_the_nearest(settings: list[str], words: list[str]) -> None:
    with pytest.raises(ConfigError) as refused:
        laid(*settings)
    assert all(word in str(refused.value) for word in words)


def test_in_python_it_is_refused_as_well() -> None:
    with pytest.raises(ValidationError, match="margin_slope: not a setting of dpo"):
        Objective(name="dpo", margin_slope=0.2)
    assert Objective(name="dpo", margin="none", sharing="none") == Objective(name="dpo")  # true of it all the same


def test_every_setting_is_listed() -> None:
    listed = set(setting_names())
    for name in names():
        assert {f"align.objective.{key}" for key in settings_of(name)} <= listed
    for key, setting in own_settings().items():
        assert Objective.model_fields[key].description == setting.description


def test_a_line_is_all_that_a_new_objective_needs_for_its_settings() -> None:
    # In a process of its own, where the registry has one more line before settings are made from it.
    code = """
import sys
from recray.objectives.registry import OBJECTIVES, OWN, Line, Setting
OBJECTIVES["newpo"] = Line("dmpo:dmpo_loss", OWN, ("beta", Setting("sharpness", 3.0, "How sharp.", most=9.0)))
from recray.cli import resolve
from recray.config import setting_names
chosen = resolve("demo", settings=["align.objective.name=newpo", "align.objective.sharpness=4"]).align.objective
assert chosen.model_dump() == {"name": "newpo", "beta": 1.0, "sharpness": 4.0}, chosen
assert "align.objective.sharpness" in set(setting_names())
assert resolve("demo").align.objective.name == "napo"
assert not {"torch", "ray"} & sys.modules.keys()
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_one_name_means_one_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    twice = Line("dpo:dpo_loss", (), ("beta", Setting("target_margin", 2.0, "Another.")))
    monkeypatch.setattr(registry, "OBJECTIVES", OBJECTIVES | {"other": twice})
    with pytest.raises(ValueError, match="different settings by 'target_margin'"):
        own_settings()


@pytest.mark.parametrize(
    ("recipe", "changed_since", "expected"),
    [
        ("demo", [], "3ec99d0fc15d2f79"),
        ("movielens", ["align.validation_rows=1136"], "bb38f8ee953a0c44"),
        ("napo_as_released", ["align.validation_rows=1136"], "20716f60656d5ff0"),
    ],
)
def test_results_of_napo_from_before_there_were_others_are_up_to_date(
    recipe: str, changed_since: list[str], expected: str
) -> None:
    # What an objective can be given since then is off, and not written down: fingerprints are what they were.
    then = override(RECIPES[recipe].make(), settings=changed_since)
    part = then.align.model_dump(mode="json")
    napo = {key: value for key, value in part.items() if key != "objective"}
    assert part["objective"].keys() == {"name", *settings_of("napo")} - OPTIONS.keys() - set(YOUNGER)
    assert fingerprint("align", 1, part, 0, {}) == expected, napo
    anchored = override(then, settings=["align.objective.nll_weight=0.1"])
    assert fingerprint("align", 1, anchored.align.model_dump(mode="json"), 0, {}) != expected


def test_settings_that_an_objective_does_not_read_do_not_make_its_results_out_of_date() -> None:
    tree = Objective(name="dpo").model_copy(update={"margin_slope": 9.0})
    assert tree.model_dump() == Objective(name="dpo").model_dump()
