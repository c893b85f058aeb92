import json
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest
from pydantic import ValidationError

from recray.config import Lora, Negatives, Objective, Pipeline, Users, override, setting_names, validated, variants
from recray.errors import ConfigError
from recray.objectives import registry

PIPELINE = Pipeline(name="test")


def test_settings_of_other_samplers_are_not_written_down() -> None:
    assert Negatives().model_dump() == {"sampler": "uniform", "num": 15, "exponent": 1.0}  # as it was with two samplers
    assert set(Negatives(sampler="nearest").model_dump()) == {
        *("sampler", "num", "exponent", "nearest_from", "nearest_to"),
    }
    assert "sampler" not in Users().model_dump()
    assert {"sampler", "hardest", "uniform_share"} <= set(
        Users(loss="sampled_softmax", sampler="adaptive_mixed").model_dump()
    )
    assert not {"folds", "shuffled"} & set(Users().model_dump())  # as it was without them
    assert Users(folds=2, shuffled=0.5).model_dump().items() > {"folds": 2, "shuffled": 0.5}.items()
    switched = override(PIPELINE, settings=["negatives.sampler=in_batch", "negatives.batch_rows=64"])
    assert validated(switched.model_dump(mode="json")) == switched


def test_a_pipeline_is_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        PIPELINE.align.steps = 3  # type: ignore[misc]


def test_a_file_lies_over_the_recipe_and_settings_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text('{"align": {"steps": 7, "global_batch": 8}}')
    resolved = override(PIPELINE, file=str(file), settings=["align.steps=9"])
    assert (resolved.align.steps, resolved.align.global_batch) == (9, 8)
    assert resolved.align.objective == PIPELINE.align.objective
    assert resolved.sft == PIPELINE.sft


def test_the_last_of_two_settings_counts() -> None:
    assert override(PIPELINE, settings=["seed=1", "seed=2"]).seed == 2


@pytest.mark.parametrize(
    ("setting", "path", "value"),
    [
        ("align.optimiser.learning_rate=1e-5", ("align", "optimiser", "learning_rate"), 1e-5),
        ("align.objective.guard=false", ("align", "objective", "guard"), False),
        ("ingest.data=/a/b=c.parquet", ("ingest", "data"), "/a/b=c.parquet"),
        ("ingest.data=null", ("ingest", "data"), None),
        ("evaluate.ks=[1, 3]", ("evaluate", "ks"), (1, 3)),
        ("sft.prompt.template=titles", ("sft", "prompt", "template"), "titles"),
    ],
)
def test_a_setting_is_read_as_json_else_as_text(setting: str, path: tuple[str, ...], value: object) -> None:
    found: object = override(PIPELINE, settings=[setting])
    for step in path:
        found = getattr(found, step)
    assert found == value


def test_an_adapters_settings_lie_below_none() -> None:
    assert override(PIPELINE, settings=["align.lora.rank=4"]).align.lora == Lora(rank=4)
    named = override(PIPELINE, settings=['sft.lora.target_modules=["q_proj"]', "sft.lora.dropout=0.1"])
    assert named.sft.lora == Lora(target_modules=("q_proj",), dropout=0.1)
    assert override(named, settings=["sft.lora=null"]) == PIPELINE
    assert "align.lora.rank" in set(setting_names())


NF4 = ["sft.model.quantization=nf4", "sft.lora.rank=8", "sft.model.path=x", "resources.gpus_per_worker=1"]


def test_a_base_may_be_quantised_under_an_adapter_on_a_gpu() -> None:
    assert override(PIPELINE, settings=NF4).sft.model.quantization == "nf4"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["reference.source=adapter_off"], "align.lora is not set"),
        (["sft.model.tokens=titles", "sft.prompt.template=instruction"], "set sft.model.tokens=words"),
        (["sft.model.tokens=titles", "sft.model.path=some/model"], "needs a model made here"),
        ([*NF4, "sft.lora=null"], "which needs sft.lora"),
        ([*NF4, "sft.model.path=null"], "which needs sft.model.path"),
        ([*NF4, "resources.gpus_per_worker=0"], "which needs resources.gpus_per_worker"),
        ([*NF4, "sft.optimiser.zero_stage=3"], "zero_stage of 2 or less"),
        (["sft.lora.target_modules=[]"], "at least 1 item"),
        (["sft.lora.ranks=3"], "sft.lora.ranks: unknown setting; the nearest is sft.lora.rank"),
    ],
)
def test_adapters_without_what_they_need_are_refused(settings: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        override(PIPELINE, settings=settings)


def test_what_is_printed_can_be_read_again(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    changed = override(PIPELINE, settings=["align.steps=5", "evaluate.ks=[2]"])
    file.write_text(changed.model_dump_json())
    assert override(PIPELINE, file=str(file)) == changed


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["align.step=3"], ["align.step", "unknown", "align.steps"]),
        (["aling.steps=3"], ["aling", "align"]),
        (["align.steps=many"], ["align.steps", "integer", "many"]),
        (["align.steps=0"], ["align.steps", "greater than or equal to 1"]),
        (["sequences.split=random"], ["sequences.split", "time_cut", "random"]),
        (["align.steps"], ["align.steps", "="]),
        (["align.num_negatives=64"], ["64", "negatives.num"]),
        (["negatives.sampler=mixed", "negatives.exponent=2"], ["negatives.exponent", "mixed", "nearest is"]),
        (["negatives.sampler=in_batch", "negatives.num=40"], ["40", "31 items a row", "negatives.batch_rows"]),
        (["negatives.sampler=nearest", "negatives.nearest_to=12"], ["15", "2 items a row", "negatives.nearest_from"]),
        (["negatives.sampler=top_k_stochastic", "negatives.top_k=200"], ["200", "negatives.candidates, 100"]),
        (["users.sampler=uniform"], ["users.sampler", "full_softmax", "sampled_negatives"]),
        (["users.loss=sampled_softmax", "users.hardest=9"], ["users.hardest", "popularity negatives"]),
        (["users.loss=sampled_softmax", "users.sampler=adaptive", "users.hardest=257"], ["257", "256"]),
        (["align=3"], ["align"]),
    ],
)
def test_a_wrong_setting_is_named_with_what_was_expected(settings: list[str], words: list[str]) -> None:
    with pytest.raises(ConfigError) as refused:
        override(PIPELINE, settings=settings)
    assert all(word in str(refused.value) for word in words)


def test_all_wrong_settings_are_told_at_once() -> None:
    with pytest.raises(ConfigError, match=r"(?s)seed:.*align\.step:"):
        override(PIPELINE, settings=["align.step=3", "seed=-1"])


@pytest.mark.parametrize(("text", "word"), [("{", "JSON"), ("[1]", "object"), (None, "no such file")])
def test_a_wrong_file_is_named(tmp_path: Path, text: str | None, word: str) -> None:
    file = tmp_path / "config.json"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ConfigError, match=word) as refused:
        override(PIPELINE, file=str(file))
    assert str(file) in str(refused.value)


def borrowing(name: str) -> dict[str, str]:
    """Settings under which all that say what is borrowed hold."""
    return {"reuse": "item", "guard_near": "mask"} if registry.lengthens(name) else {}


def test_every_setting_that_is_named_can_be_set() -> None:
    young = ["sft.replaced=0.1", "align.refresh_every=50", "negatives.sampler=self_play"]
    with_adapters = override(PIPELINE, settings=["sft.lora.rank=16", "align.lora.rank=16", *young])
    found = set(paths_of(with_adapters.model_dump(mode="json")))
    on = {"nll_weight": 0.5, "length_normalised": True}
    for name in registry.names():  # of an objective's settings, those it reads are written down
        objective = Objective(name=name, **(on if registry.settings_of(name) else {}), **borrowing(name))
        found |= set(paths_of({"align": {"objective": objective.model_dump(mode="json")}}))
    for sampler in Negatives.samplers():
        found |= set(paths_of({"negatives": Negatives(sampler=sampler).model_dump(mode="json")}))
        if sampler in get_args(Users.model_fields["sampler"].annotation):
            users = Users(loss="sampled_softmax", sampler=sampler, folds=2, shuffled=0.5)
            found |= set(paths_of({"users": users.model_dump(mode="json")}))
    assert set(setting_names()) <= found
    assert validated(json.loads(PIPELINE.model_dump_json())) == PIPELINE


def paths_of(tree: dict[str, object], prefix: str = "") -> Iterator[str]:
    for key, value in tree.items():
        yield prefix + key
        if isinstance(value, dict):
            yield from paths_of(value, f"{prefix}{key}.")


WIDE = "napo margin=none global_batch=64"


def test_a_comparison_lays_its_texts_over_align() -> None:
    pipeline = override(
        Pipeline(name="test"),
        settings=[
            "align.objective.beta=2",
            f"compare.objectives={json.dumps(['napo', WIDE, 'sdpo optimiser.learning_rate=1e-5', 'sft'])}",
            "compare.steps=7",
        ],
    )
    found = variants(pipeline)
    assert list(found) == list(pipeline.compare.objectives)
    own, other, sdpo, sft = found.values()
    assert (own.objective.name, own.objective.beta, own.global_batch) == ("napo", 2.0, pipeline.align.global_batch)
    assert (other.objective.margin, other.objective.beta, other.global_batch) == ("none", 2.0, 64)
    assert (sdpo.objective.beta, sdpo.optimiser.learning_rate) == (1.0, 1e-5)  # another objective: its own defaults
    assert sft.objective.name == "sft"
    assert {each.steps for each in found.values()} == {7}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("dppo", r"'dppo' refused:\n  objective.name: no such objective; the nearest is 'dpo'"),
        ("dpo margin_base=1", r"'dpo margin_base=1' refused:\n  objective.margin_base: not a setting of dpo"),
        ("dpo beta", r"'beta' has no '='"),
    ],
)
def test_a_comparison_that_can_not_be_is_refused_before_anything_starts(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        override(Pipeline(name="test"), settings=[f"compare.objectives={json.dumps([text])}"])
