"""What forward keeps for backward: no logits of the whole batch, and with checkpointing no layers."""

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from recray.lm.layout import Segments, candidate_layout, separate_layout
from recray.lm.scorer import LOGITS_KEPT, ItemScorer, Packed, sum_by_slot, to_device

SCORED = 12 * 30 * 7


def tiny(vocabulary: int) -> PreTrainedModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)


def rows(*, users: int = 12, candidates: int = 30, item_tokens: int = 7) -> Segments:
    rng = np.random.default_rng(0)
    count = users * candidates
    return Segments(
        prompt_tokens=rng.integers(8000, size=users * 40),
        prompt_lengths=np.full(users, 40),
        candidate_tokens=rng.integers(8000, size=count * item_tokens),
        candidate_lengths=np.full(count, item_tokens),
        candidates_each=np.full(users, candidates),
    )


def kept_bytes(model: PreTrainedModel, packed: Packed) -> tuple[int, Tensor]:
    """Bytes that autograd keeps from one forward pass, weights left out; and the gradient."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        scores = sum_by_slot(ItemScorer(model)(packed), packed)
    kept = sum(found.values())
    gradient = torch.autograd.grad(scores.square().mean(), list(model.parameters()))
    return kept, torch.cat([part.flatten() for part in gradient])


def test_what_is_kept_does_not_grow_with_the_vocabulary() -> None:
    packed = to_device(candidate_layout(rows()), "cpu")
    assert packed.source.numel() == SCORED
    assert packed.state.numel() * 8_192 > LOGITS_KEPT
    small, _ = kept_bytes(tiny(8_192), packed)
    large, _ = kept_bytes(tiny(131_072), packed)
    assert large == pytest.approx(small, rel=0.01)
    assert large < SCORED * 131_072 * 4 / 50  # one copy of the logits would be fifty times as much


def test_sharing_keeps_less_than_a_quarter_at_fifteen_negatives() -> None:
    segments = rows(users=1, candidates=16)
    shared, separate = (to_device(layout(segments), "cpu") for layout in (candidate_layout, separate_layout))
    model = tiny(8_192)
    # The logits of item tokens are the same in both: the saving is in the layers.
    bytes_of = [2 * packed.state.numel() * 8_192 * 4 for packed in (shared, separate)]
    ours, theirs = (
        kept_bytes(model, packed)[0] - logits for packed, logits in zip((shared, separate), bytes_of, strict=True)
    )
    assert ours < theirs / 2.5
    full_logits = separate.tokens.numel() * 8_192 * 4
    assert ours + bytes_of[0] < (theirs + 2 * full_logits) / 4


def test_checkpointed_layers_keep_less_and_give_the_same_gradient() -> None:
    packed = to_device(candidate_layout(rows()), "cpu")
    model = tiny(8_192).train()
    plain, expected = kept_bytes(model, packed)
    model.activation_checkpointing_enable({"use_reentrant": False})
    saving, gradient = kept_bytes(model, packed)
    assert saving < plain / 2
    assert (gradient - expected).norm() <= 1e-5 * expected.norm()
