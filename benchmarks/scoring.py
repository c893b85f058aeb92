"""Three ways to score a positive and its negatives with gradients, and how to measure them on equal terms.

Axes:
    U  users                  C  candidates of a user: the positive, then N negatives
"""

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from numpy import ndarray
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, PreTrainedConfig

from recray.lm.attention import use_flex
from recray.lm.layout import Segments, candidate_layout, separate_layout
from recray.lm.prefix_attention import use_prefix
from recray.lm.scorer import ItemScorer, Packed, sum_by_slot, to_device

ITEM_TOKENS = (6, 14)  # shortest and longest item


class Method(NamedTuple):
    """A way to score candidates."""

    name: str
    prepare: Callable[[Segments], Any]
    score: Callable[[Any], Float[Tensor, " candidates"]]


def made(config: PreTrainedConfig, *, dtype: torch.dtype, device: str) -> nn.Module:
    """Return a model with random weights, seeded."""
    torch.manual_seed(0)
    model: nn.Module = AutoModelForCausalLM.from_config(deepcopy(config), dtype=dtype).to(device)
    return model


def users(count: int, *, prompt_tokens: int, num_negatives: int, vocabulary: int, seed: int = 0) -> Segments:
    """Return prompts of one length with 1 + N candidates of 6 to 14 tokens, drawn at random."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(ITEM_TOKENS[0], ITEM_TOKENS[1] + 1, size=count * (1 + num_negatives))
    return Segments(
        prompt_tokens=rng.integers(3, vocabulary, size=count * prompt_tokens),
        prompt_lengths=np.full(count, prompt_tokens, dtype=np.int64),
        candidate_tokens=rng.integers(3, vocabulary, size=int(lengths.sum())),
        candidate_lengths=lengths.astype(np.int64),
        candidates_each=np.full(count, 1 + num_negatives, dtype=np.int64),
    )


def methods(model: nn.Module, device: str) -> list[Method]:
    """Return recray's way and two baselines, all with the same model.

    - *shared*: one pass over the prompt, the head on item tokens.
    - *separate*: every candidate behind its own prompt, the head on item tokens.
    - *concatenated*: as in the S-DPO release: every candidate a row of a padded batch, logits and their log-softmax
      over the vocabulary at every token, a mask that keeps the item's.

    The baselines' rows need no mask, so causal attention runs in its fast form.
    """
    scorer = ItemScorer(model)

    def score(packed: Packed) -> Tensor:
        return sum_by_slot(scorer(packed), packed)

    return [
        Method("shared", lambda segments: to_device(candidate_layout(segments), device), score),
        Method("separate", lambda segments: to_device(separate_layout(segments), device), score),
        Method("concatenated", lambda segments: _padded(segments, device), lambda batch: _full_logits(model, *batch)),
    ]


def _padded(segments: Segments, device: str) -> tuple[Tensor, Tensor]:
    """Return tokens [rows, width] and labels, 0 where a token is not the item's, for a batch of whole sequences."""
    prompts = np.split(segments.prompt_tokens, np.cumsum(segments.prompt_lengths)[:-1])
    items = np.split(segments.candidate_tokens, np.cumsum(segments.candidate_lengths)[:-1])
    owner = np.repeat(np.arange(len(prompts)), segments.candidates_each)
    width = max(prompts[user].size + item.size for user, item in zip(owner, items, strict=True))
    tokens, labels = np.zeros((2, len(items), width), dtype=np.int64)
    for row, (user, item) in enumerate(zip(owner, items, strict=True)):
        start = prompts[user].size
        tokens[row, :start], tokens[row, start : start + item.size] = prompts[user], item
        labels[row, start : start + item.size] = item
    return torch.from_numpy(tokens).to(device), torch.from_numpy(labels).to(device)


def _full_logits(model: Any, tokens: Tensor, labels: Tensor) -> Float[Tensor, " rows"]:
    logits = model(input_ids=tokens, use_cache=False).logits[:, :-1].float()
    wanted = labels[:, 1:]
    each = logits.log_softmax(dim=-1).gather(2, wanted[:, :, None])[:, :, 0]
    scores: Tensor = (each * (wanted != 0)).double().sum(dim=1)
    return scores


def pass_both_ways(method: Method, batch: Any, weight: Tensor) -> Tensor:
    """Score, and backpropagate a fixed gradient; return the scores."""
    scores = method.score(batch)
    (scores * weight).sum().backward()  # type: ignore[no-untyped-call]
    return scores.detach()


def seconds_each(runs: Sequence[Callable[[], Any]], repeats: int, device: str) -> list[float]:
    """Return the median time of each run, all interleaved, after one round to warm up."""
    times: list[list[float]] = [[] for _ in runs]
    for round_number in range(repeats + 1):
        for run, taken in zip(runs, times, strict=True):
            _wait(device)
            started = time.perf_counter()
            run()
            _wait(device)
            if round_number:
                taken.append(time.perf_counter() - started)
    return [statistics.median(taken) for taken in times]


def peak_bytes(run: Callable[[], Any], model: nn.Module, device: str) -> int:
    """Return the most memory that `run` held at once beyond what was there before, weights' gradients left out."""
    model.zero_grad(set_to_none=False)  # gradients are there before and after, so they do not count
    gc.collect()
    if device == "cuda":
        _wait(device)
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    held = peak = 0
    records = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(records, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def gradient(model: nn.Module) -> Tensor:
    """Return all gradients as one float32 vector, and clear them."""
    whole = torch.cat([p.grad.detach().float().flatten() for p in model.parameters() if p.grad is not None])
    model.zero_grad(set_to_none=True)
    return whole


def tokens_passed(segments: Segments) -> dict[str, int]:
    """Return the tokens that pass through the layers when prompts are read once, and once a candidate.

    An item's last token is read by neither.
    """
    items = int((segments.candidate_lengths - 1).sum())
    return {
        "shared": int(segments.prompt_lengths.sum()) + items,
        "separate": int((segments.prompt_lengths * segments.candidates_each).sum()) + items,
    }


def attend_fast(model: nn.Module, device: str) -> str:
    """Put into the model what recray attends by here; return its name."""
    (use_flex if device == "cuda" else use_prefix)(model)
    config: Any = model.config
    name: str = config._attn_implementation
    return name


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def weights_for(count: int, device: str) -> Tensor:
    """Return the gradient that scores are given: of both signs, none of them zero."""
    rng: ndarray = np.random.default_rng(1).normal(size=count)
    return torch.from_numpy(rng.astype(np.float32)).to(device)
