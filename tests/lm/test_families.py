"""Every supported family, from a tiny configuration, against its own plain forward pass, one candidate at a time."""

import logging
from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    CohereConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2Config,
    Qwen3Config,
)

from recray.data.catalogue import Catalogue
from recray.errors import ModelError
from recray.lm import layout as layout_module
from recray.lm import scorer as scorer_module
from recray.lm.attention import FLEX, known_positions, mask_form, use_flex, why_not_shared
from recray.lm.layout import Layout, candidate_layout, one_a_row, separate_layout
from recray.lm.prefix_attention import _PrefixAttention, prefix_plan, use_prefix
from recray.lm.scorer import ItemScorer, Packed, lay_out_streams, score_rows, segments_of, sum_by_slot, to_device
from recray.lm.selfcheck import choose_sharing, largest_difference

Rows = tuple[list[np.ndarray], list[np.ndarray]]

SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 48,
    "max_position_embeddings": 256,
    "initializer_range": 0.1,  # the default makes attention so flat that a wrong mask would hardly show
    "attention_dropout": 0.0,
    "pad_token_id": 0,
}
WINDOW = 6  # positions; shorter than the prompts

FAMILIES: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**SMALL),
    "qwen2": Qwen2Config(**SMALL),
    "qwen2-window": Qwen2Config(**SMALL, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1),
    "qwen3": Qwen3Config(**SMALL, head_dim=16),
    "mistral": MistralConfig(**SMALL, sliding_window=None),
    "mistral-window": MistralConfig(**SMALL, sliding_window=WINDOW),
    "gemma2": Gemma2Config(**SMALL, head_dim=16, sliding_window=WINDOW, query_pre_attn_scalar=16),
    "gemma3": Gemma3TextConfig(**SMALL, head_dim=16, sliding_window=WINDOW, sliding_window_pattern=2),
    "phi3": Phi3Config(**SMALL, original_max_position_embeddings=256),
    "phi3-window": Phi3Config(**SMALL, original_max_position_embeddings=256, sliding_window=WINDOW),
    "gpt2": GPT2Config(
        n_embd=32, n_layer=2, n_head=2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, initializer_range=0.1
    ),
}


def built(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, **options: Any) -> PreTrainedModel:
    config = deepcopy(config)
    config.vocab_size = len(tokenizer)
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, **options).eval()
    return model


@pytest.fixture(scope="module")
def family(request: pytest.FixtureRequest, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    return built(FAMILIES[request.param], tokenizer)


@pytest.fixture
def narrow_rows_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention without masks for rows of any width, each segment in its own."""
    monkeypatch.setattr(scorer_module, "WIDE", 0)
    monkeypatch.setattr(layout_module, "pack", one_a_row)


each_family = pytest.mark.parametrize("family", list(FAMILIES), indirect=True)


def scores(model: PreTrainedModel, catalogue: Catalogue, rows: Rows, *, shared: bool) -> Tensor:
    segments = segments_of(catalogue, *rows)
    packed = to_device(candidate_layout(segments) if shared else separate_layout(segments), "cpu")
    return sum_by_slot(ItemScorer(model)(packed), packed)


def gradient(model: PreTrainedModel, value: Tensor) -> Tensor:
    return torch.cat([part.flatten() for part in torch.autograd.grad(value, list(model.parameters()))])


@each_family
def test_shared_scores_are_the_models_own(family: PreTrainedModel, catalogue: Catalogue, rows: Rows) -> None:
    assert why_not_shared(family) is None
    assert largest_difference(ItemScorer(family), catalogue, *rows) < 1e-5


@each_family
def test_shared_gradients_are_those_of_separate_rows(family: PreTrainedModel, catalogue: Catalogue, rows: Rows) -> None:
    together, apart = (scores(family, catalogue, rows, shared=shared) for shared in (True, False))
    torch.testing.assert_close(together, apart, atol=1e-5, rtol=0)
    weight = torch.linspace(-1, 1, len(together))
    ours, theirs = (gradient(family, (value * weight).sum()) for value in (together, apart))
    assert (ours - theirs).norm() <= 1e-5 * theirs.norm()


ragged = st.lists(
    st.tuples(st.lists(st.integers(0, 11), max_size=7), st.lists(st.integers(0, 11), min_size=1, max_size=6)),
    min_size=1,
    max_size=5,
)


@each_family
@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(shape=ragged)
def test_any_histories_and_candidates_share_exactly(
    family: PreTrainedModel, catalogue: Catalogue, shape: list[tuple[list[int], list[int]]]
) -> None:
    histories = [np.array(history, dtype=np.int64) for history, _ in shape]
    candidates = [np.array(items, dtype=np.int64) for _, items in shape]
    with torch.no_grad():
        together, apart = (scores(family, catalogue, (histories, candidates), shared=s) for s in (True, False))
    torch.testing.assert_close(together, apart, atol=1e-5, rtol=0)


PREFIX_FAMILIES = [name for name in FAMILIES if name != "gemma2"]  # caps its logits, which fused attention does not


@pytest.mark.usefixtures("narrow_rows_too")
@pytest.mark.parametrize("name", PREFIX_FAMILIES)
def test_attention_without_masks_has_the_scores_and_gradients_of_separate_rows(
    name: str, tokenizer: PreTrainedTokenizerBase, catalogue: Catalogue, rows: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, plain = (built(FAMILIES[name], tokenizer) for _ in range(2))
    assert use_prefix(model)
    taken: list[bool] = []
    attend = _PrefixAttention.apply
    monkeypatch.setattr(_PrefixAttention, "apply", lambda *given: taken.append(True) or attend(*given))
    together, apart = scores(model, catalogue, rows, shared=True), scores(plain, catalogue, rows, shared=False)
    assert bool(taken) == ("window" not in name and name != "gemma3")  # a window that cuts needs masks
    torch.testing.assert_close(together, apart, atol=1e-5, rtol=0)
    weight = torch.linspace(-1, 1, len(together))
    ours, theirs = (gradient(m, (v * weight).sum()) for m, v in ((model, together), (plain, apart)))
    assert (ours - theirs).norm() <= 1e-5 * theirs.norm()
    assert largest_difference(ItemScorer(model), catalogue, *rows) < 1e-5


@pytest.mark.usefixtures("narrow_rows_too")
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(shape=ragged)
def test_attention_without_masks_is_exact_for_any_shape(
    tokenizer: PreTrainedTokenizerBase, catalogue: Catalogue, shape: list[tuple[list[int], list[int]]]
) -> None:
    # GPT-2: the others round to float32 inside, whatever their weights are.
    model = built(FAMILIES["gpt2"], tokenizer).double()
    histories = [np.array(history, dtype=np.int64) for history, _ in shape]
    candidates = [np.array(items, dtype=np.int64) for _, items in shape]
    found = []
    for attend, shared in ((use_prefix(model), True), (False, False)):
        if not attend:
            model.set_attn_implementation("eager")
        value = scores(model, catalogue, (histories, candidates), shared=shared)
        weight = torch.linspace(-1, 1, len(value), dtype=torch.float64)
        found.append((value.detach(), gradient(model, (value * weight).sum())))
    (ours, our_gradient), (theirs, their_gradient) = found
    torch.testing.assert_close(ours, theirs, atol=1e-9, rtol=0)
    torch.testing.assert_close(our_gradient, their_gradient, atol=1e-9, rtol=1e-9)


def test_rows_of_several_segments_and_streams_have_no_plan(catalogue: Catalogue, rows: Rows) -> None:
    streams = to_device(lay_out_streams(catalogue, [np.array([3, 4, 5, 6]), np.array([7, 8]), np.array([9, 9])]), "cpu")
    assert streams.tokens.shape == (2, 4)  # two streams share a row
    packed = to_device(candidate_layout(segments_of(catalogue, *rows)), "cpu")
    assert len(packed.tokens) < 4
    for layout in (streams, packed):
        assert prefix_plan(layout.positions, layout.segment, layout.branch, torch.float32) is None


@pytest.mark.parametrize("name", ["mistral-window", "phi3-window", "gemma2", "gemma3", "qwen2-window"])
def test_a_window_over_places_in_the_row_would_be_wrong(
    name: str, tokenizer: PreTrainedTokenizerBase, catalogue: Catalogue, rows: Rows
) -> None:
    model = built(FAMILIES[name], tokenizer)
    scorer = ItemScorer(model)
    scorer._mask_form = mask_form(model)._replace(window=None)
    assert largest_difference(scorer, catalogue, *rows) > 1e-3


@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral-window", "gemma2", "gemma3"])
def test_flex_attention_scores_as_dense_attention_does(
    name: str, tokenizer: PreTrainedTokenizerBase, catalogue: Catalogue, rows: Rows
) -> None:
    flex, dense = (built(FAMILIES[name], tokenizer, attn_implementation="eager") for _ in range(2))
    assert use_flex(flex)
    assert flex.config._attn_implementation == FLEX
    with torch.no_grad():
        ours, theirs = (scores(model, catalogue, rows, shared=True) for model in (flex, dense))
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    assert largest_difference(ItemScorer(flex), catalogue, *rows) < 1e-5


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (BloomConfig(hidden_size=32, n_layer=2, n_head=2, initializer_range=0.1), "ALiBi"),
        (MambaConfig(hidden_size=32, num_hidden_layers=2, state_size=4), "linear_attention"),
    ],
)
def test_what_can_not_share_is_scored_apart_and_says_so(
    config: PreTrainedConfig,
    reason: str,
    tokenizer: PreTrainedTokenizerBase,
    catalogue: Catalogue,
    rows: Rows,
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = built(config, tokenizer)
    with caplog.at_level(logging.WARNING):
        assert choose_sharing(ItemScorer(model), catalogue, *rows) < 1e-4
    assert reason in caplog.text
    assert "its own copy" in caplog.text
    assert not catalogue.shares_prompt
    plain = lay_out_streams(catalogue, [np.array([1, 2, 3]), np.array([4, 5])])
    assert plain.plain
    assert plain.tokens.tolist() == [[1, 2, 3], [4, 5, 0]]


def test_a_model_that_fails_the_check_is_scored_apart(
    tokenizer: PreTrainedTokenizerBase, catalogue: Catalogue, rows: Rows, caplog: pytest.LogCaptureFixture
) -> None:
    # Stands for an architecture that nobody here knows: it has a window, and does not say so.
    model = built(FAMILIES["mistral-window"], tokenizer)
    scorer = ItemScorer(model)
    scorer._mask_form = mask_form(model)._replace(window=None)
    with caplog.at_level(logging.WARNING):
        assert choose_sharing(scorer, catalogue, *rows) < 1e-4
    assert "would differ by" in caplog.text
    assert not catalogue.shares_prompt


def test_a_model_whose_head_we_do_not_know_is_refused(
    tokenizer: PreTrainedTokenizerBase, catalogue: Catalogue, rows: Rows
) -> None:
    # Cohere's logits are scaled behind the head.
    model = built(CohereConfig(**SMALL, logit_scale=0.0625), tokenizer)
    with pytest.raises(ModelError, match="more than a matrix and a soft cap"):
        choose_sharing(ItemScorer(model), catalogue, *rows)


def test_rotary_embeddings_that_change_with_length_are_used_below_the_change() -> None:
    long = Phi3Config(**SMALL, original_max_position_embeddings=64)
    long.rope_parameters = {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1.0] * 8,
        "long_factor": [2.0] * 8,
        "original_max_position_embeddings": 64,
    }
    dynamic = LlamaConfig(**SMALL, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0})
    assert known_positions(model_of(long)) == 64
    assert known_positions(model_of(dynamic)) == 256
    assert known_positions(model_of(LlamaConfig(**SMALL))) == 256
    assert known_positions(model_of(FAMILIES["gpt2"])) == 1024


def model_of(config: PreTrainedConfig) -> PreTrainedModel:
    config.vocab_size = 8
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return model


def test_separate_rows_are_scored_without_masks_of_ours(
    model: PreTrainedModel, catalogue: Catalogue, rows: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[set[str]] = []
    forward = model.base_model.forward

    def spy(**arguments: Any) -> Any:
        taken.append(set(arguments))
        return forward(**arguments)

    monkeypatch.setattr(model.base_model, "forward", spy)
    scores(model, catalogue, rows, shared=False)
    assert taken == [{"input_ids", "use_cache"}]


def test_budgets_count_every_copy_of_a_prompt(catalogue: Catalogue, model: PreTrainedModel, rows: Rows) -> None:
    seen: list[tuple[int, ...]] = []

    class Counting(ItemScorer):
        def forward(self, packed: Packed) -> Tensor:
            seen.append(tuple(packed.tokens.shape))
            return super().forward(packed)

    together = score_rows(Counting(model).eval(), catalogue, *rows, tokens_per_micro_batch=200)
    catalogue.shares_prompt = False
    apart = score_rows(Counting(model).eval(), catalogue, *rows, tokens_per_micro_batch=200)
    for ours, theirs in zip(together, apart, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
    assert all(height * width <= 200 or height == 6 for height, width in seen)


def test_layouts_say_whether_they_are_plain(catalogue: Catalogue, rows: Rows) -> None:
    segments = segments_of(catalogue, *rows)
    layouts: list[Layout] = [candidate_layout(segments), separate_layout(segments)]
    assert [layout.plain for layout in layouts] == [False, True]
    assert [layout.num_scores for layout in layouts] == [13, 13]
    assert layouts[0].label.tolist() == layouts[1].label.tolist()
