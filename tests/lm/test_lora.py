"""Adapters in place: fresh ones change nothing, and merged, saved and loaded ones score as they did in memory."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, PreTrainedModel, PreTrainedTokenizerBase

from recray.config import Lora
from recray.data.catalogue import Catalogue
from recray.errors import ConfigError, ModelError
from recray.lm.load import load_model, save_model
from recray.lm.lora import (
    adapter_off,
    add_adapter,
    has_adapter,
    load_adapter,
    merge_adapter,
    nf4_settings,
    require_nf4,
    save_adapter,
)
from recray.lm.scorer import ItemScorer, score_rows

Rows = tuple[list[np.ndarray], list[np.ndarray]]
LORA = Lora(rank=4, alpha=6.0)


def scores(model: PreTrainedModel, catalogue: Catalogue, rows: Rows) -> np.ndarray:
    return np.concatenate(score_rows(ItemScorer(model).eval(), catalogue, *rows, tokens_per_micro_batch=4096))


def trained(model: PreTrainedModel, lora: Lora = LORA) -> PreTrainedModel:
    """The model with an adapter that does something, as after training."""
    add_adapter(model, lora, seed=2)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def test_a_fresh_adapter_changes_no_score_and_is_all_that_is_trained(
    model: PreTrainedModel, catalogue: Catalogue, rows: Rows
) -> None:
    before = scores(model, catalogue, rows)
    state = torch.random.get_rng_state()
    add_adapter(model, LORA, seed=0)
    assert torch.equal(torch.random.get_rng_state(), state)
    np.testing.assert_array_equal(scores(model, catalogue, rows), before)
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert len(names) == 2 * 2 * 7  # A and B of seven linear layers in each of two blocks; not the head
    assert all("lora_" in name for name in names)


def test_a_layer_adds_alpha_over_rank_times_b_a(model: PreTrainedModel) -> None:
    layer = trained(model).get_submodule("model.layers.0.mlp.up_proj")
    x = torch.linspace(-1, 1, 32)
    a, b = (layer.get_submodule(f"lora_{name}.default").weight for name in "AB")
    expected = layer.base_layer.weight @ x + 6.0 / 4 * (b @ (a @ x))
    torch.testing.assert_close(layer(x), expected)


def test_the_same_seed_gives_the_same_adapter(model: PreTrainedModel) -> None:
    weights = []
    for seed in (1, 1, 2):
        add_adapter(model, LORA, seed=seed)
        weights.append(model.get_submodule("model.layers.1.self_attn.q_proj.lora_A.default").weight.clone())
        merge_adapter(model)
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_switched_off_the_base_scores_and_switched_on_again_the_adapter_is_trained(
    model: PreTrainedModel, catalogue: Catalogue, rows: Rows
) -> None:
    base = scores(model, catalogue, rows)
    adapted = scores(trained(model), catalogue, rows)
    assert np.abs(adapted - base).min() > 1e-3
    before = [p.requires_grad for p in model.parameters()]
    with adapter_off(model):
        np.testing.assert_array_equal(scores(model, catalogue, rows), base)
    np.testing.assert_array_equal(scores(model, catalogue, rows), adapted)
    assert [p.requires_grad for p in model.parameters()] == before
    with pytest.raises(KeyError), adapter_off(model):
        raise KeyError
    np.testing.assert_array_equal(scores(model, catalogue, rows), adapted)


# 2026-11: peft 0.21 asks transformers 5.23 under a name that goes in v6.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_merged_saved_and_loaded_it_scores_as_in_memory(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, catalogue: Catalogue, rows: Rows, tmp_path: Path
) -> None:
    save_model(tmp_path / "base", model, tokenizer, catalogue)
    expected = scores(trained(model), catalogue, rows)
    save_adapter(tmp_path / "adapter", model)
    files = {file.name for file in (tmp_path / "adapter").iterdir()}
    assert files == {"adapter_config.json", "adapter_model.safetensors"}
    assert all(".lora_" in name for name in load_file(tmp_path / "adapter" / "adapter_model.safetensors"))

    merge_adapter(model)
    assert not has_adapter(model)
    assert all(parameter.requires_grad for parameter in model.parameters())
    save_model(tmp_path / "merged", model, tokenizer, catalogue)
    names = [load_file(tmp_path / folder / "model.safetensors").keys() for folder in ("base", "merged")]
    assert names[0] == names[1]
    merged, _ = load_model(tmp_path / "merged", dtype=torch.float32)
    np.testing.assert_allclose(scores(merged, catalogue, rows), expected, atol=1e-5, rtol=0)

    ours, _ = load_model(tmp_path / "base", dtype=torch.float32)
    load_adapter(ours, tmp_path / "adapter")
    np.testing.assert_array_equal(scores(ours, catalogue, rows), expected)
    theirs, _ = load_model(tmp_path / "base", dtype=torch.float32)
    peft = PeftModel.from_pretrained(theirs, str(tmp_path / "adapter"))
    np.testing.assert_array_equal(scores(peft.base_model.model, catalogue, rows), expected)


def test_named_layers_only_and_transposed_ones(
    tokenizer: PreTrainedTokenizerBase, catalogue: Catalogue, rows: Rows, tmp_path: Path
) -> None:
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=2)
    gpt2 = AutoModelForCausalLM.from_config(config).eval()
    lora = Lora(rank=2, target_modules=("c_attn",))
    expected = scores(trained(gpt2, lora), catalogue, rows)
    save_adapter(tmp_path, gpt2)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"] == ["c_attn"]
    merge_adapter(gpt2)
    np.testing.assert_allclose(scores(gpt2, catalogue, rows), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["q_prj", "lm_head", "embed_tokens", "proj"])
def test_a_name_that_is_no_layer_of_the_model_is_refused(model: PreTrainedModel, name: str) -> None:
    with pytest.raises(ConfigError, match=f"names '{name}', but no linear layer .* there are: down_proj, gate_proj"):
        add_adapter(model, Lora(target_modules=("q_proj", name)), seed=0)


def test_an_adapter_of_another_model_is_refused(model: PreTrainedModel, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="the adapter can't be loaded"):
        load_adapter(model, tmp_path)
    save_adapter(tmp_path, trained(model))
    merge_adapter(model)
    file = tmp_path / "adapter_model.safetensors"
    whole = load_file(file)
    for wrong in (dict(list(whole.items())[1:]), {name: tensor[:1] for name, tensor in whole.items()}):
        save_file(wrong, file)
        with pytest.raises(ModelError, match="is not an adapter of this model"):
            load_adapter(model, tmp_path)
        merge_adapter(model)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_quantising_is_refused_where_it_can_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(ModelError, match=r"needs bitsandbytes; install .*recray\[quantization\]"):
        require_nf4()
    monkeypatch.setattr("importlib.util.find_spec", lambda _: object())
    with pytest.raises(ModelError, match="needs a CUDA GPU"):
        nf4_settings(torch.bfloat16)
