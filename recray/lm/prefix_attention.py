"""Attention for prompts with candidates behind them, without a mask: on CPUs.

Dense attention with a mask works out T x T logits of a row, and most of them are masked: a candidate sees no
neighbour, and the prompt no candidate. Here the prompt attends to itself, causally, all candidate tokens of a user to
its prompt, and each candidate to itself, causally. The last two are one softmax over two sets of keys: with outputs a
and b and logarithms l_a and l_b of their denominators, the whole is exp(l_a - l) a + exp(l_b - l) b with
l = logaddexp(l_a, l_b). In backward each part is given the whole's output and l: the kernel makes probabilities as
exp(logit - l), so its gradients are exact. Nothing of the size of the logits is kept, as in FlashAttention (Dao et al.,
arXiv 2205.14135, section 3.1).

With P prompt and C candidate tokens of length L it works out P^2 / 2 + C (P + L) logits, not (P + C)^2.

It serves layouts with one segment a row; `prefix_plan` says where it doesn't.

Axes:
    R  rows                          T  tokens of a row    H  heads    G  heads of keys and values    d  their width
    P  tokens of the longest prompt  K  candidates         L  tokens of the longest candidate
"""

from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

PREFIX = "recray_prefix"  # transformers' name for it

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class PrefixPlan(NamedTuple):
    """Which tokens attend together in rows that begin with a prompt, its candidates behind it."""

    shortest: int  # prompt, in tokens
    longest: int
    behind: Bool[Tensor, "R 1 P 1"] | None  # columns of the longest prompt that are behind a row's own; None if none is
    masked: Float[Tensor, "R 1 1 P"] | None  # the same, to be added to logits of these keys
    candidate: Bool[Tensor, "R 1 tail 1"] | None  # which columns from `shortest` on are a candidate's; None: all are
    own: Int[Tensor, "K L"]  # place of candidate tokens among all tokens, row by row; 0 for padding
    filled: Int[Tensor, " n"]  # entries of `own` that are no padding
    tokens: Int[Tensor, " n"]  # what stands there
    back: Int[Tensor, "R tail"]  # entry of `own` for each column from `shortest` on; 0 where there is none


def prefix_plan(
    positions: Int[Tensor, "R T"], segment: Int[Tensor, "R T"], branch: Int[Tensor, "R T"], dtype: torch.dtype
) -> PrefixPlan | None:
    """Return the plan of a layout (`recray.lm.layout`), or None if a row has several segments, or no candidates.

    Args:
        positions: Of the layout.
        segment: Of the layout.
        branch: Of the layout.
        dtype: Of attention.
    """
    row, column = (branch > 0).nonzero(as_tuple=True)
    there = segment >= 0
    if not row.numel() or bool((there & (segment != segment[:, :1])).any()):
        return None
    lengths = (there & (branch == 0)).sum(dim=1)
    shortest, longest = int(lengths.min()), int(lengths.max())
    columns = torch.arange(segment.shape[1])
    behind = (columns[:longest] >= lengths[:, None])[:, None, :, None]
    each = branch.amax(dim=1)
    number = (each.cumsum(0) - each)[row] + branch[row, column] - 1
    step = positions[row, column] - lengths[row]
    own = torch.full((int(each.sum()), int(step.max()) + 1), -1, dtype=torch.int64)
    own[number, step] = row * segment.shape[1] + column
    filled = (own >= 0).flatten().nonzero()[:, 0]
    back = torch.zeros_like(segment)
    back[row, column] = number * own.shape[1] + step
    candidate = (branch > 0)[:, None, shortest:, None]
    ragged = bool(behind.any())
    return PrefixPlan(
        shortest,
        longest,
        behind if ragged else None,
        torch.zeros(behind.shape, dtype=dtype).masked_fill(behind, -torch.inf).transpose(2, 3) if ragged else None,
        None if bool(candidate.all()) else candidate,
        own.clamp_min(0),
        filled,
        own.flatten()[filled],
        back[:, shortest:],
    )


class _PrefixAttention(torch.autograd.Function):
    """[R, T, H, d] queries and [R, T, G, d] keys and values in, [R, T, H, d] out."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, plan: PrefixPlan, scale: float | None) -> Tensor:
        groups = query.shape[2] // key.shape[2]
        q, k, v = _heads(query), _heads(key, groups), _heads(value, groups)
        prompt, tail = slice(0, plan.longest), slice(plan.shortest, None)
        first, first_sum = _flash(q[:, :, prompt], k[:, :, prompt], v[:, :, prompt], 0.0, True, scale=scale)
        a, l_a = _flash(q[:, :, tail], k[:, :, prompt], v[:, :, prompt], 0.0, False, attn_mask=plan.masked, scale=scale)
        own = (_own(tensor, plan, times) for tensor, times in ((query, 1), (key, groups), (value, groups)))
        b, l_b = (_back(tensor, plan) for tensor in _flash(*own, 0.0, True, scale=scale))
        both = torch.logaddexp(l_a, l_b)
        weighted = ((l_a - both).exp()[..., None] * a + (l_b - both).exp()[..., None] * b).to(query.dtype)

        out = query.new_zeros(query.shape)
        total = both.new_zeros(*query.shape[:2], query.shape[2])
        ahead, ahead_sum = _heads(out), total.transpose(1, 2)  # views
        ahead[:, :, prompt], ahead_sum[:, :, prompt] = first, first_sum
        if plan.candidate is not None:
            weighted = torch.where(plan.candidate, weighted, ahead[:, :, tail])
            both = torch.where(plan.candidate[..., 0], both, ahead_sum[:, :, tail])
        ahead[:, :, tail], ahead_sum[:, :, tail] = weighted, both
        ctx.save_for_backward(query, key, value, out, total)
        ctx.plan, ctx.scale = plan, scale
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        query, key, value, out, total = ctx.saved_tensors
        plan: PrefixPlan = ctx.plan
        groups = query.shape[2] // key.shape[2]
        q, k, v, o = _heads(query), _heads(key, groups), _heads(value, groups), _heads(out)
        upstream, sums = _heads(gradient), total.transpose(1, 2)
        prompt, tail = slice(0, plan.longest), slice(plan.shortest, None)
        # Contiguous, whatever `query` is, as parts are written through flat views; keys and values by head of queries.
        by = [query.new_zeros(query.shape) for _ in range(3)]

        def part(queries: slice, left_out: Tensor | None, causal: bool) -> None:
            """Add what queries in these columns give to their own, and to keys and values of prompts."""
            g, log_sum = upstream[:, :, queries], sums[:, :, queries]
            if left_out is not None:  # an infinite denominator is a probability of zero: no gradient from these
                g, log_sum = g.masked_fill(left_out, 0.0), log_sum.masked_fill(left_out[..., 0], torch.inf)
            found = _flash_backward(
                g,
                q[:, :, queries],
                k[:, :, prompt],
                v[:, :, prompt],
                o[:, :, queries],
                log_sum,
                0.0,
                causal,
                attn_mask=None if causal else plan.masked,
                scale=ctx.scale,
            )
            for whole, columns, more in zip(by, (queries, prompt, prompt), found, strict=True):
                _heads(whole)[:, :, columns] += more

        part(prompt, plan.behind, True)
        part(tail, None if plan.candidate is None else ~plan.candidate, False)
        own = [
            _own(tensor, plan, times)
            for tensor, times in ((gradient, 1), (query, 1), (key, groups), (value, groups), (out, 1), (total, 1))
        ]
        own[0] = own[0].masked_fill(_padding(plan), 0.0)
        for whole, more in zip(by, _flash_backward(*own, 0.0, True, scale=ctx.scale), strict=True):
            whole.flatten(end_dim=1)[plan.tokens] += more.transpose(1, 2).flatten(end_dim=1)[plan.filled]
        by_query, by_key, by_value = by
        return by_query, _summed(by_key, groups), _summed(by_value, groups), None, None


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
    whole = (tensor.transpose(1, 2) for tensor in (query, key, value))
    out: Tensor = _PrefixAttention.apply(*whole, plan, scaling)  # type: ignore[no-untyped-call]
    return out, None


def _heads(tensor: Tensor, groups: int = 1) -> Tensor:
    """Return [R, H, T, d] of a [R, T, H, d] tensor, each head repeated for a group of queries."""
    return (tensor if groups == 1 else tensor.repeat_interleave(groups, dim=2)).transpose(1, 2)


def _own(tensor: Tensor, plan: PrefixPlan, groups: int = 1) -> Tensor:
    """Return [K, H, L, ...] of a [R, T, H, ...] tensor, each head repeated for a group of queries."""
    chosen = tensor.flatten(end_dim=1)[plan.own]
    return (chosen if groups == 1 else chosen.repeat_interleave(groups, dim=2)).transpose(1, 2)


def _back(tensor: Tensor, plan: PrefixPlan) -> Tensor:
    """Return [R, H, tail, ...] of a [K, H, L, ...] tensor."""
    return tensor.transpose(1, 2).flatten(end_dim=1)[plan.back].transpose(1, 2)


def _padding(plan: PrefixPlan) -> Bool[Tensor, "K 1 L 1"]:
    empty = torch.ones(plan.own.numel(), dtype=torch.bool)
    empty[plan.filled] = False
    return empty.view(len(plan.own), 1, -1, 1)


def _summed(tensor: Float[Tensor, "R T H d"], groups: int) -> Float[Tensor, "R T G d"]:
    return tensor if groups == 1 else tensor.view(*tensor.shape[:2], -1, groups, tensor.shape[3]).sum(dim=3)
