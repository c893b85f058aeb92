"""What only a GPU can show: FlexAttention's gradients, and bf16."""

from copy import deepcopy

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
)

from recray.lm.attention import FLEX, use_flex
from recray.lm.layout import Segments, candidate_layout, separate_layout
from recray.lm.scorer import ItemScorer, sum_by_slot, to_device

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")

SHAPE = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.1,
}
FAMILIES = [
    Qwen2Config(**SHAPE),
    MistralConfig(**SHAPE, sliding_window=24, head_dim=32),
    Gemma2Config(**SHAPE, sliding_window=24, head_dim=32, query_pre_attn_scalar=32),
]


def segments(seed: int) -> Segments:
    rng = np.random.default_rng(seed)
    prompts, each = rng.integers(20, 150, size=5), rng.integers(1, 9, size=5)
    lengths = rng.integers(1, 12, size=each.sum())
    return Segments(
        prompt_tokens=rng.integers(3, 512, size=prompts.sum()),
        prompt_lengths=prompts,
        candidate_tokens=rng.integers(3, 512, size=lengths.sum()),
        candidate_lengths=lengths,
        candidates_each=each,
    )


def built(config: PreTrainedConfig, dtype: torch.dtype, *, flex: bool) -> PreTrainedModel:
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(deepcopy(config), attn_implementation="eager")
    model: PreTrainedModel = made.to("cuda", dtype)
    if flex:
        assert use_flex(model)
        assert model.config._attn_implementation == FLEX
    return model


def scores_and_gradient(model: PreTrainedModel, ragged: Segments, *, shared: bool) -> tuple[Tensor, Tensor]:
    packed = to_device(candidate_layout(ragged) if shared else separate_layout(ragged), "cuda")
    scores = sum_by_slot(ItemScorer(model)(packed), packed)
    weight = torch.linspace(-1, 1, len(scores), device="cuda")
    parts = torch.autograd.grad((scores * weight).sum(), list(model.parameters()))
    return scores.detach(), torch.cat([part.float().flatten() for part in parts])


@pytest.mark.parametrize("config", FAMILIES, ids=lambda config: config.model_type)
@pytest.mark.parametrize("seed", range(3))  # other widths: one compilation serves them
def test_flex_attention_has_the_gradients_of_separate_rows(config: PreTrainedConfig, seed: int) -> None:
    ours, our_gradient = scores_and_gradient(built(config, torch.float32, flex=True), segments(seed), shared=True)
    dense = built(config, torch.float32, flex=False)
    theirs, their_gradient = scores_and_gradient(dense, segments(seed), shared=False)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)  # TF32 is off; kernels sum in another order
    assert (our_gradient - their_gradient).norm() <= 1e-4 * their_gradient.norm()


@pytest.mark.parametrize("config", FAMILIES, ids=lambda config: config.model_type)
def test_bf16_differs_by_its_own_rounding_only(config: PreTrainedConfig) -> None:
    exact, _ = scores_and_gradient(built(config, torch.float32, flex=True), segments(0), shared=False)
    shared, _ = scores_and_gradient(built(config, torch.bfloat16, flex=True), segments(0), shared=True)
    separate, _ = scores_and_gradient(built(config, torch.bfloat16, flex=False), segments(0), shared=False)
    rounding = (separate - exact).abs().max()
    assert (shared - exact).abs().max() <= 2 * rounding + 0.05
