"""A whole alignment step beside the bare model on the same packed tokens: what recray adds."""

from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig

from benchmarks.scoring import attend_fast, made, seconds_each, users
from recray.config import Objective
from recray.lm.attention import dense_masks, mask_form
from recray.lm.layout import candidate_layout
from recray.lm.scorer import ItemScorer, to_device
from recray.train.engine import PlainEngine
from recray.train.step import AlignStep, MarginCentre
from recray.train.units import MicroBatch, Unit, pack_unit, unpack_unit

USERS, NEGATIVES, PROMPT = 8, 15, 256


def step_overhead(shape: dict[str, Any], repeats: int) -> dict[str, Any]:
    """Return the time of a step at accumulation 1, over that of the bare model's forward and backward.

    The step is all that happens between two steps in one process: read the unit, score, exchange, the NAPO loss with
    sharing and margins, backward, clipping, AdamW. The bare model is transformers' own on the same rows, its masks made
    beforehand, its head on the scored tokens, with cross-entropy.
    """
    model: Any = made(LlamaConfig(**shape), dtype=torch.float32, device="cpu")
    layout = candidate_layout(
        users(USERS, prompt_tokens=PROMPT, num_negatives=NEGATIVES, vocabulary=shape["vocab_size"])
    )
    data = pack_unit(Unit(0, 0, [MicroBatch(np.arange(USERS), layout)], _arrays(), list(range(USERS))))
    attend_fast(model, "cpu")
    engine = PlainEngine(ItemScorer(model), weight_decay=0.01, clip_norm=1.0)
    step = AlignStep(Objective(), MarginCentre())

    packed = to_device(layout, "cpu")
    masks = dense_masks(mask_form(model), packed.positions, packed.segment, packed.branch, torch.float32)

    def bare() -> None:
        states = model.base_model(
            input_ids=packed.tokens, attention_mask=masks, position_ids=packed.positions, use_cache=False
        ).last_hidden_state
        logits = model.lm_head(states.flatten(end_dim=1)[packed.source])
        cross_entropy(logits, packed.label).backward()  # type: ignore[no-untyped-call]
        model.zero_grad(set_to_none=True)

    def whole() -> None:
        step(engine, unpack_unit(data), learning_rate=1e-5)

    alone, together = seconds_each([bare, whole], repeats, "cpu")
    return {
        "tokens": int((layout.segment >= 0).sum()),
        "bare_ms": round(1000 * alone, 1),
        "step_ms": round(1000 * together, 1),
        "step_over_bare": round(together / alone, 3),
    }


def _arrays() -> dict[str, np.ndarray]:
    """Return what the objective needs beside scores: everybody may borrow everything."""
    rng = np.random.default_rng(0)
    each = (USERS, USERS, NEGATIVES)
    return {
        "place": np.arange(USERS),
        "reference": rng.normal(-30, 3, size=(USERS, 1 + NEGATIVES)).astype(np.float32),
        "usable": np.ones(each, dtype=bool),
        "confidence": rng.random(each).astype(np.float32),
        "liking_sum": np.zeros(1, dtype=np.float32),
    }
