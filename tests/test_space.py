"""Ranges, and the space of a search as the configuration has it."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recray.config import Align, Pipeline, override, point_of_space, search_space, validated
from recray.errors import ConfigError
from recray.space import Range

PIPELINE = Pipeline(name="test")
MARGIN, NUMBER, RATE = "objective.margin_base", "num_negatives", "optimiser.learning_rate"
SHARES = st.floats(0.0, 1.0, exclude_max=True)


def test_values_by_hand() -> None:
    assert [Range(choice=("a", "b", "c")).at(share) for share in (0.0, 0.34, 0.99)] == ["a", "b", "c"]
    assert Range(uniform=(1.0, 3.0)).at(0.25) == 1.5
    assert Range(loguniform=(1e-4, 1e-2)).at(0.5) == pytest.approx(1e-3)
    assert [Range(int=(2, 4)).at(share) for share in (0.0, 0.4, 0.99)] == [2, 3, 4]


@given(SHARES)
def test_values_lie_in_their_range(share: float) -> None:
    assert 0.1 <= float(Range(uniform=(0.1, 0.7)).at(share)) <= 0.7
    assert 0.1 <= float(Range(loguniform=(0.1, 0.7)).at(share)) <= 0.7
    assert Range(int=(-1, 1)).at(share) in (-1, 0, 1)


@pytest.mark.parametrize(
    ("written", "told"),
    [
        ({}, "expected one of choice, uniform, loguniform, int, got none"),
        ({"uniform": [0, 1], "int": [0, 1]}, "got uniform and int"),
        ({"unifrom": [0, 1]}, "the nearest is uniform"),
        ({"uniform": [1, 1]}, "first number below the second"),
        ({"loguniform": [0, 1]}, "above 0"),
        ({"choice": []}, "values that differ"),
        ({"choice": [1, 1]}, "values that differ"),
        ({"uniform": [0, math.inf]}, "first number below the second"),
    ],
)
def test_a_faulty_range_is_refused(written: object, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        Range.model_validate(written)


def test_true_and_one_are_two_choices() -> None:
    assert Range.model_validate({"choice": [True, 1]}).ends == (True, 1)


def space_of(*settings: str, pipeline: Pipeline = PIPELINE) -> dict[str, Range]:
    return dict(search_space(override(pipeline, settings=list(settings))))


def test_the_default_is_what_the_objective_and_its_negatives_allow() -> None:
    assert space_of() == {MARGIN: Range(uniform=(0, 2)), NUMBER: Range(choice=(1, 3, 7, 15))}
    assert space_of("negatives.num=10")[NUMBER] == Range(choice=(1, 3, 7, 10))
    assert space_of("align.objective.name=simpo") == {"objective.target_margin": Range(uniform=(0.3, 2.0))}
    assert set(space_of("align.objective.name=dpo")) == {"objective.beta"}  # reads one negative, and has no margin
    assert set(space_of("align.objective.name=sft")) == {RATE}
    # Where prompts show the candidates, reference scores hold for all of them alone.
    assert set(space_of("sft.prompt.template=instruction_candidates")) == {MARGIN}


def test_settings_are_named_whole_short_or_in_groups_and_null_takes_one_out() -> None:
    written = '{"margin_base": {"uniform": [0, 1]}, "optimiser": {"learning_rate": {"loguniform": [1e-5, 1e-3]}}}'
    assert space_of(f"tune.space={written}") == {
        MARGIN: Range(uniform=(0, 1)),
        RATE: Range(loguniform=(1e-5, 1e-3)),
    }
    first = override(PIPELINE, settings=[f"tune.space={written}"])
    assert space_of("tune.space.margin_base=null", pipeline=first) == {RATE: Range(loguniform=(1e-5, 1e-3))}
    # Another kind takes the place of the first, whatever name it is given by.
    for name in ("margin_base", "objective.margin_base"):
        assert space_of(f'tune.space.{name}={{"choice": [0, 1]}}', pipeline=first)[MARGIN] == Range(choice=(0, 1))
    assert validated(first.model_dump(mode="json")) == first
    again = override(first, settings=['tune.space.num_negatives={"choice": [1]}'])
    assert space_of('tune.space.num_negatives={"int": [1, 7]}', pipeline=again)[NUMBER] == Range(int=(1, 7))


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ('margn_base={"uniform": [0, 1]}', "margn_base: .*nearest is objective.margin_base"),
        ('steps={"int": [1, 9]}', "steps: not a setting that can be searched"),  # the search has its own
        ('target_margin={"uniform": [0, 1]}', "target_margin: not a setting .*nearest is objective.margin"),  # of simpo
        ('margin_base={"uniform": [-1, 1]}', "margin_base: .*greater than or equal to 0, got -1"),
        ('global_batch={"choice": [8, 1]}', "global_batch: .*greater than or equal to 2, got 1"),
        ('num_negatives={"choice": [1, 33]}', "asks for 33 negatives a row, but negatives.num draws 15"),
        ('objective={"choice": ["napo", "sdpoo"]}', "no such objective; the nearest is 'sdpo'"),
        ("margin_base=null", "tune.space is empty"),
    ],
)
def test_what_cannot_be_searched_is_refused_with_the_nearest_name(setting: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        override(PIPELINE, settings=["tune.space={}", f"tune.space.{setting}"])


def test_under_another_objective_a_search_keeps_what_that_one_has() -> None:
    first = override(PIPELINE, settings=['tune.space={"margin_base": {"uniform": [0, 1]}, "beta": {"choice": [1, 2]}}'])
    assert override(first, settings=["align.objective.name=dpo"]).tune.space == {"objective.beta": Range(choice=(1, 2))}
    only = override(PIPELINE, settings=['tune.space={"margin_base": {"uniform": [0, 1]}}'])
    assert override(only, settings=["align.objective.name=dpo"]).tune.space is None  # its own, by the registry
    asked = ["align.objective.name=dpo", 'tune.space.margin_base={"uniform": [0, 2]}']
    with pytest.raises(ConfigError, match="margin_base: not a setting that can be searched here"):
        override(first, settings=asked)


def test_rungs_lie_where_runs_are_validated() -> None:
    with pytest.raises(ConfigError, match="first_rung is 25, but must be a multiple of tune.validate_every, 20"):
        override(PIPELINE, settings=["tune.stop_early=true", "tune.first_rung=25"])


def test_a_point_leaves_out_what_its_objective_does_not_have() -> None:
    base = Align()
    point = {"objective.name": "simpo", MARGIN: 0.5, "objective.target_margin": 0.7, NUMBER: 3, RATE: 1e-5}
    found = point_of_space(base, point)
    assert found.objective.settings["target_margin"] == 0.7
    assert "margin_base" not in found.objective.model_dump()
    assert (found.num_negatives, found.optimiser.learning_rate) == (3, 1e-5)
    assert found.objective.beta == 2.0  # its own default, not that of the base
    assert point_of_space(base, {MARGIN: 0.5}).objective.margin_base == 0.5
    assert point_of_space(base, {"lora.rank": 4}).lora.rank == 4  # type: ignore[union-attr]
