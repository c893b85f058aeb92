"""Models go into folders and come out the same; folders that do not fit are refused with what to do."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from recray.data.catalogue import Catalogue
from recray.data.prompts import find_template, training_texts
from recray.data.tokenizer import train_tokenizer
from recray.errors import CatalogueError, ModelError
from recray.lm import load
from recray.lm.load import (
    load_model,
    load_prompt,
    load_tokenizer,
    make_model,
    open_catalogue,
    open_recommender,
    save_model,
    stored_dtype,
)

LABELS = ["Toy Story (1995)", "Heat (1995)", "七人の侍", "Amélie"]
SHAPE = {"hidden_size": 16, "layers": 2, "heads": 2, "intermediate_size": 24, "max_positions": 64}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(training_texts(find_template("instruction"), LABELS), 300)


@pytest.fixture(scope="module")
def catalogue(tokenizer: PreTrainedTokenizerFast) -> Catalogue:
    return Catalogue.build(LABELS, tokenizer, find_template("instruction"), 200)


@pytest.fixture(scope="module")
def saved(tokenizer: PreTrainedTokenizerFast, catalogue: Catalogue, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "new" / "recommender"
    save_model(folder, make_model(tokenizer, **SHAPE, seed=1), tokenizer, catalogue)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(saved, tmp_path / "recommender"))


def weights(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return dict(model.state_dict())


def assert_same_weights(first: PreTrainedModel, second: PreTrainedModel) -> None:
    torch.testing.assert_close(weights(first), weights(second), rtol=0, atol=0)


def edit(path: Path, **changes: Any) -> None:
    """Change keys of a JSON file; None removes one."""
    value = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: item for key, item in value.items() if item is not None}))


# Made here


def test_a_made_model_has_the_shape_asked_for(tokenizer: PreTrainedTokenizerFast) -> None:
    model = make_model(tokenizer, **SHAPE, seed=0)
    config = model.config
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (16, 2, 2)
    assert (config.intermediate_size, config.max_position_embeddings) == (24, 64)
    assert (config.pad_token_id, config.bos_token_id, config.eos_token_id) == (0, 1, 2)
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert model.get_input_embeddings().num_embeddings == len(tokenizer)


def test_the_seed_decides_the_weights_and_the_callers_random_state_is_kept(tokenizer: PreTrainedTokenizerFast) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = make_model(tokenizer, **SHAPE, seed=7)
    assert torch.equal(torch.rand(3), expected)
    assert_same_weights(first, make_model(tokenizer, **SHAPE, seed=7))
    other = make_model(tokenizer, **SHAPE, seed=8)
    name = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(weights(first)[name], weights(other)[name])


def test_heads_that_do_not_divide_the_width_are_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ModelError, match="hidden_size 16 can't be cut into 3 heads .* multiple of 6"):
        make_model(tokenizer, **(SHAPE | {"heads": 3}), seed=0)
    with pytest.raises(ModelError, match="even size"):
        make_model(tokenizer, **(SHAPE | {"heads": 16}), seed=0)  # one number a head can't be rotated


# Out and in again


def test_a_recommender_comes_back_as_it_went(
    saved: Path, tokenizer: PreTrainedTokenizerFast, catalogue: Catalogue
) -> None:
    for labels in (None, LABELS):
        model, opened = open_recommender(saved, labels)
        assert_same_weights(model, make_model(tokenizer, **SHAPE, seed=1))
        assert opened.fingerprint == catalogue.fingerprint
        assert opened.labels == tuple(LABELS)
    assert open_catalogue(saved).fingerprint == catalogue.fingerprint
    assert load_prompt(saved) == catalogue.facts()
    assert load_tokenizer(saved).get_vocab() == tokenizer.get_vocab()
    assert not list(saved.glob("*.bin"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_number_format_is_kept(
    tokenizer: PreTrainedTokenizerFast, catalogue: Catalogue, tmp_path: Path, dtype: torch.dtype
) -> None:
    made = make_model(tokenizer, **SHAPE, seed=1, dtype=dtype)
    save_model(tmp_path, made, tokenizer, catalogue)
    assert stored_dtype(tmp_path) == dtype
    model, _ = load_model(tmp_path, dtype=dtype)
    assert {tensor.dtype for tensor in weights(model).values()} == {dtype}
    assert_same_weights(model, made)


def qwen2(rows: int) -> PreTrainedModel:
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=rows,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            intermediate_size=24,
            tie_word_embeddings=False,
        )
    )


def gpt2(rows: int) -> PreTrainedModel:
    return GPT2LMHeadModel(GPT2Config(vocab_size=rows, n_embd=16, n_layer=1, n_head=2, n_positions=64))


@pytest.mark.parametrize("make", [qwen2, gpt2])
def test_other_architectures_go_the_same_way(
    make: Callable[[int], PreTrainedModel], tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    made = make(len(tokenizer) + 5)  # spare rows, as many models have
    made.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    model, found = load_model(str(tmp_path / "base"), dtype=torch.float32)
    assert_same_weights(model, made)
    # By what was found: for Qwen2, transformers puts pre-tokenisation of its own into any tokenizer.
    catalogue = Catalogue.build(LABELS, found, find_template("instruction"), 200)
    save_model(tmp_path / "mine", model, found, catalogue)
    again, opened = open_recommender(tmp_path / "mine", LABELS)
    assert_same_weights(again, made)
    assert opened.fingerprint == catalogue.fingerprint


def test_a_chat_template_and_a_missing_padding_token_survive(folder: Path, tmp_path: Path) -> None:
    edit(folder / "tokenizer_config.json", pad_token=None)
    model, tokenizer = load_model(folder, dtype=torch.float32)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == model.config.pad_token_id == 2
    assert model.get_input_embeddings().num_embeddings == len(tokenizer)
    tokenizer.chat_template = "{{ messages[0]['content'] }}{% if add_generation_prompt %}\n> {% endif %}"
    chat = Catalogue.build(LABELS, tokenizer, find_template("chat"), 200)
    save_model(tmp_path / "chat", model, tokenizer, chat)
    _, opened = open_recommender(tmp_path / "chat", LABELS)
    assert opened.fingerprint == chat.fingerprint


def test_loading_is_quiet(saved: Path, capfd: pytest.CaptureFixture[str]) -> None:
    open_recommender(saved)
    assert capfd.readouterr() == ("", "")


# Refused


def test_other_items_are_refused_with_both_fingerprints(saved: Path, catalogue: Catalogue) -> None:
    others = Catalogue.build(LABELS[::-1], load_tokenizer(saved), find_template("instruction"), 200)
    with pytest.raises(CatalogueError, match=rf"{catalogue.fingerprint}.*these 4 items .* are {others.fingerprint}"):
        open_recommender(saved, LABELS[::-1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_tokens": 100}, "these 4 items with template version 1 are"),
        ({"fingerprint": "0" * 16}, "trained with catalogue 0000000000000000"),
        ({"template": "instructions"}, "recray lacks: no prompt template 'instructions'; the nearest is 'instruction'"),
    ],
)
def test_another_prompt_is_refused(folder: Path, change: dict[str, Any], message: str) -> None:
    edit(folder / load.PROMPT_FILE, **change)
    with pytest.raises(CatalogueError, match=message):
        open_recommender(folder)


def test_a_changed_tokenizer_is_refused(folder: Path) -> None:
    train_tokenizer(["Heat Heat (1995)"], 262).save_pretrained(folder)
    with pytest.raises(CatalogueError, match="was trained with catalogue"):
        open_recommender(folder)


def test_a_folder_that_recray_did_not_write_is_no_recommender(folder: Path) -> None:
    (folder / load.PROMPT_FILE).unlink()
    with pytest.raises(ModelError, match=r"no .*recray_prompt.json, .* run `recray sft`"):
        open_recommender(folder)


@pytest.mark.parametrize("text", ["{", "[]", "{}", "\ufffd"])
def test_a_damaged_prompt_file_is_refused(folder: Path, text: str) -> None:
    (folder / load.PROMPT_FILE).write_text(text)
    with pytest.raises(
        ModelError, match=r"recray_prompt.json(:| is not JSON| lacks fingerprint, max_tokens, shares_prompt)"
    ):
        load_prompt(folder)


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _pickled(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"model.norm.weight": torch.ones(16)}, folder / "pytorch_model.bin")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "config.json").unlink(), "has no config.json, so it is not a Hugging Face model folder"),
        (lambda f: (f / "config.json").write_text("{"), "config.json is not JSON"),
        (lambda f: (f / "config.json").write_text("[]"), "config.json: expected a JSON dict, got list"),
        (lambda f: edit(f / "config.json", model_type="nosuch"), "can't be loaded .*nosuch"),
        (lambda f: edit(f / "config.json", num_hidden_layers=3), r"9 weights .* model.layers.2.\S+ for one, and would"),
        (lambda f: edit(f / "config.json", hidden_size=32), r"has shape \[\d+, 16\] in the weights, but \[\d+, 32\]"),
        (lambda f: (f / "model.safetensors").unlink(), "no file named model.safetensors"),
        (lambda f: _cut(f / "model.safetensors"), "SafetensorError"),
        (_pickled, "no file named model.safetensors"),
        (lambda f: (f / "tokenizer.json").unlink(), "the tokenizer can't be loaded"),
        (lambda f: _cut(f / "tokenizer.json"), "the tokenizer can't be loaded"),
        (lambda f: (f / "tokenizer_config.json").write_text("{"), "the tokenizer can't be loaded"),
        (lambda f: edit(f / "tokenizer_config.json", eos_token=None), "no end-of-sequence token, so no item can end"),
    ],
)
def test_a_damaged_folder_is_refused(folder: Path, damage: Callable[[Path], Any], message: str) -> None:
    damage(folder)
    with pytest.raises(ModelError, match=message):
        load_model(folder, dtype=torch.float32)


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(folder: Path) -> None:
    train_tokenizer([f"word{number}" for number in range(500)], 400).save_pretrained(folder)
    with pytest.raises(ModelError, match=r"tokenizer has 400 tokens, but the model has embeddings for \d+; use the"):
        load_model(folder, dtype=torch.float32)


@pytest.mark.parametrize("name", ["/no/such/folder", Path("no/such"), "./none", "~/none-such-folder", "a/b/c"])
def test_a_missing_folder_is_named(name: str | Path) -> None:
    with pytest.raises(ModelError, match=r"no model folder .*(such|none|c).*; name a folder .* hub id like OWNER/NAME"):
        load_model(name, dtype=torch.float32)


def test_a_hub_id_out_of_reach_is_a_model_error() -> None:
    with pytest.raises(ModelError, match=r"nobody/nothing \(no folder here, so taken for a hub id\)"):
        load_model("nobody/nothing", dtype=torch.float32)


def test_an_attention_that_is_not_there_is_a_model_error(saved: Path) -> None:
    with pytest.raises(ModelError, match="can't be loaded .*nosuch"):
        load_model(saved, dtype=torch.float32, attention="nosuch")
