"""Attention for prompts with candidates behind them, without a mask: on CPUs.

Dense attention with a mask works out T x T logits of a row, and most of them are masked: a candidate sees no
neighbour, and the prompt no candidate. Here the prompt attends to itself, causally, all candidate tokens of a user to
its prompt, and each candidate to itself, causally. The last two are one softmax over two sets of keys: with outputs a
and b and logarithms l_a and l_b of their denominators, the whole is exp(l_a - l) a + exp(l_b - l) b with
l = logaddexp(l_a, l_b). In backward each part is given the whole's output and l: the kernel makes probabilities as
exp(logit - l), so its gradients are exact. Nothing of the size of the logits is kept, as in FlashAttention (Dao et al.,
arXiv 2205.14135, section 3.1).

With P prompt and C candidate tokens of length L it works out P^2 / 2 + C (P + L) logits, not (P + C)^2.

Axes:
    N  tokens of all rows, end to end     H  heads            G  heads of keys and values     d  width of a head
    U  segments                           P  prompt tokens    C  candidate tokens of a segment
    K  candidates                         L  tokens of a candidate
"""

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

PREFIX = "recray_prefix"  # transformers' name for it

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class Grid(NamedTuple):
    """Ragged tokens as a matrix, padded on the right."""

    place: Int[Tensor, "rows width"]  # among all tokens; 0 for padding
    filled: Int[Tensor, " n"]  # entries of the flat matrix that are no padding
    tokens: Int[Tensor, " n"]  # their places among all tokens
    padding: Float[Tensor, "rows 1 1 width"] | None  # to be added to logits of these keys; None without padding


class PrefixPlan(NamedTuple):
    """Which tokens attend together."""

    prompt: Grid  # [U, P]
    tail: Grid | None  # [U, C] candidate tokens by segment; None without candidates
    own: Grid | None  # [K, L] the same tokens by candidate, in the same order


def prefix_plan(
    positions: Int[Tensor, "R T"], segment: Int[Tensor, "R T"], branch: Int[Tensor, "R T"], dtype: torch.dtype
) -> PrefixPlan:
    """Return the plan of a layout (`recray.lm.layout`); `dtype` is that of attention."""
    position, owner, number = positions.flatten(), segment.flatten(), branch.flatten()
    place = torch.arange(owner.numel())
    of_prompt, of_tail = (owner >= 0) & (number == 0), number > 0
    users, step = owner[of_prompt], position[of_prompt]
    prompt = _grid(users, step, place[of_prompt], dtype)
    if not bool(of_tail.any()):
        return PrefixPlan(prompt, None, None)
    lengths = torch.bincount(users)
    user, at = owner[of_tail], place[of_tail]
    first = prompt.place[:, 0] + lengths  # of a segment's candidate tokens
    each = torch.zeros(lengths.numel(), dtype=torch.int64).scatter_reduce(0, user, number[of_tail], "amax")
    candidate = (each.cumsum(0) - each)[user] + number[of_tail] - 1
    tail = _grid(user, at - first[user], at, dtype)
    own = _grid(candidate, position[of_tail] - lengths[user], at, dtype)
    return PrefixPlan(prompt, tail, own)


def _grid(row: Int[Tensor, " n"], column: Int[Tensor, " n"], token: Int[Tensor, " n"], dtype: torch.dtype) -> Grid:
    shape = (int(row.max()) + 1, int(column.max()) + 1)
    place = torch.full(shape, -1, dtype=torch.int64)
    place[row, column] = token
    there = place >= 0
    padding = None
    if not bool(there.all()):
        padding = torch.zeros(shape, dtype=dtype).masked_fill(~there, -torch.inf)[:, None, None]
    return Grid(place.clamp_min(0), there.flatten().nonzero()[:, 0], place[there], padding)


class _PrefixAttention(torch.autograd.Function):
    """[N, H, d] queries and [N, G, d] keys and values in, [N, H, d] out."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, plan: PrefixPlan, scale: float | None) -> Tensor:
        groups = query.shape[1] // key.shape[1]
        out = torch.zeros_like(query)
        # Of padding, which attends to nothing: any finite value will do.
        total = query.new_zeros(query.shape[:2], dtype=torch.promote_types(query.dtype, torch.float32))

        prompt, tail, own = plan
        seen = _heads(key, prompt, groups), _heads(value, prompt, groups)
        found, log_sum = _flash(_heads(query, prompt), *seen, 0.0, True, scale=scale)
        out[prompt.tokens], total[prompt.tokens] = _tokens(found, prompt), _tokens(log_sum, prompt)
        if tail is not None and own is not None:
            found, log_sum = _flash(_heads(query, tail), *seen, 0.0, False, attn_mask=prompt.padding, scale=scale)
            a, l_a = _tokens(found, tail), _tokens(log_sum, tail)
            itself = _heads(key, own, groups), _heads(value, own, groups)
            found, log_sum = _flash(_heads(query, own), *itself, 0.0, True, scale=scale)
            b, l_b = _tokens(found, own), _tokens(log_sum, own)
            both = torch.logaddexp(l_a, l_b)
            weighted = (l_a - both).exp()[..., None] * a + (l_b - both).exp()[..., None] * b
            out[tail.tokens], total[tail.tokens] = weighted.to(out.dtype), both
        ctx.save_for_backward(query, key, value, out, total)
        ctx.plan, ctx.scale = plan, scale
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        query, key, value, out, total = ctx.saved_tensors
        (prompt, tail, own), groups = ctx.plan, query.shape[1] // key.shape[1]
        by_query, by_key, by_value = (torch.zeros_like(tensor) for tensor in (query, key, value))

        def part(queries: Grid, keys: Grid, causal: bool) -> tuple[Tensor, Tensor, Tensor]:
            grids = ((gradient, queries, 1), (query, queries, 1), (key, keys, groups), (value, keys, groups))
            upstream, *inputs = (_heads(tensor, grid, repeated) for tensor, grid, repeated in grids)
            upstream = upstream.masked_fill(_empty(queries), 0.0) if queries.padding is not None else upstream
            mask = None if causal else keys.padding
            results = _flash_backward(
                upstream,
                *inputs,
                _heads(out, queries),
                _heads(total, queries),
                0.0,
                causal,
                attn_mask=mask,
                scale=ctx.scale,
            )
            return (
                _tokens(results[0], queries),
                _summed(_tokens(results[1], keys), groups),
                _summed(_tokens(results[2], keys), groups),
            )

        by_query[prompt.tokens], by_key[prompt.tokens], by_value[prompt.tokens] = part(prompt, prompt, True)
        if tail is not None and own is not None:
            on_query, on_key, on_value = part(tail, prompt, False)
            by_key[prompt.tokens] += on_key
            by_value[prompt.tokens] += on_value
            itself, by_key[own.tokens], by_value[own.tokens] = part(own, own, True)
            by_query[tail.tokens] = on_query + itself
        return by_query, by_key, by_value, None, None


def use_prefix(model: nn.Module) -> bool:
    """Make a model attend through this module where its layout allows, and return whether it can.

    It can where fused attention serves: without a soft cap on the logits and without dropout.
    """
    config: Any = model.config
    config = config.get_text_config()
    dropout = getattr(config, "attention_dropout", 0.0) or getattr(config, "attn_pdrop", 0.0)
    if not getattr(model, "_supports_sdpa", False) or dropout or getattr(config, "attn_logit_softcapping", None):
        return False
    AttentionInterface.register(PREFIX, _forward)
    AttentionMaskInterface.register(PREFIX, sdpa_mask)  # for rows without a plan
    chosen: Any = model
    chosen.set_attn_implementation(PREFIX)
    return True


def as_mask(plan: PrefixPlan) -> Tensor:
    """Return something that transformers hands through to `_forward` as it is: a mask of four axes, with the plan."""
    mask: Any = torch.zeros(1, 1, 1, 1)
    mask.plan = plan
    carrier: Tensor = mask
    return carrier


def _forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attend as transformers' attention functions do: [R, heads, T, d] in, [R, T, heads, d] out."""
    plan: PrefixPlan | None = getattr(attention_mask, "plan", None)
    if plan is None:
        plain, _ = sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **options)
        return plain, None
    rows, _, columns, _ = query.shape
    flat = [tensor.transpose(1, 2).flatten(end_dim=1) for tensor in (query, key, value)]
    out: Tensor = _PrefixAttention.apply(*flat, plan, scaling)  # type: ignore[no-untyped-call]
    return out.view(rows, columns, *out.shape[1:]), None


def _heads(tensor: Tensor, grid: Grid, groups: int = 1) -> Tensor:
    """Return [rows, H, width, ...] of a [N, H, ...] tensor, each head repeated for a group of queries."""
    chosen = tensor[grid.place]
    if groups > 1:
        chosen = chosen.repeat_interleave(groups, dim=2)
    return chosen.transpose(1, 2)


def _tokens(tensor: Tensor, grid: Grid) -> Tensor:
    """Return [n, H, ...] of a [rows, H, width, ...] tensor, padding left out."""
    return tensor.transpose(1, 2).flatten(end_dim=1)[grid.filled]


def _summed(tensor: Float[Tensor, "n H d"], groups: int) -> Float[Tensor, "n G d"]:
    return tensor if groups == 1 else tensor.view(len(tensor), -1, groups, tensor.shape[-1]).sum(dim=2)


def _empty(grid: Grid) -> Tensor:
    """Return which queries are padding, as [rows, 1, width, 1]."""
    rows, width = grid.place.shape
    there = torch.zeros(rows * width, dtype=torch.bool)
    there[grid.filled] = True
    return ~there.view(rows, 1, width, 1)
