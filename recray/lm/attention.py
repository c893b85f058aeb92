"""What each token may attend to, in the form that each family of models takes.

Axes:
    R  rows                        T  tokens of a row
"""

import functools
import inspect
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from transformers import AttentionInterface, AttentionMaskInterface

FLEX = "recray_flex"  # transformers' name for our FlexAttention
LEAST_HEAD_DIM = 16
BLOCK = 128  # tokens of a side of a block in FlexAttention's sparse masks

FULL, SLIDING = "full_attention", "sliding_attention"  # transformers' names of layer types

Mask = Float[Tensor, "R 1 T T"] | BlockMask
Masks = Mask | dict[str, Mask]


class MaskForm(NamedTuple):
    """Which masks a model takes."""

    types: tuple[str, ...]  # of its layers, each once
    by_type: bool  # whether it takes a mask a layer type, or one for all layers
    window: int | None  # positions that a sliding layer sees, its own included


def mask_form(model: nn.Module) -> MaskForm:
    """Return the masks a model takes, as its configuration says.

    Qwen 2 and 3 and Gemma 2 and 3 name the type of every layer and take a mask a type; Mistral and Phi-3 have a window
    for all layers or none; Llama and GPT-2 attend fully.
    """
    config = _text_config(model)
    window: int | None = getattr(config, "sliding_window", None)
    types: list[str] | None = getattr(config, "layer_types", None)
    if types:
        return MaskForm(tuple(sorted(set(types))), by_type=True, window=window)
    return MaskForm((FULL,) if window is None else (SLIDING,), by_type=False, window=window)


def why_not_shared(model: nn.Module) -> str | None:
    """Return why candidates can't stand behind one prompt in this model; None if nothing is known against it.

    What is not known here, the self-check finds (`recray.lm.selfcheck`).
    """
    config: Any = _text_config(model)
    if getattr(config, "alibi", False) or config.model_type in ("bloom", "mpt"):
        return "its attention is biased by places in the row (ALiBi), not by positions"
    unknown = sorted(set(mask_form(model).types) - {FULL, SLIDING})
    if unknown:
        return f"its layers of type {', '.join(unknown)} carry a state from token to token, or cut the row in chunks"
    inner: Any = model.base_model
    taken = inspect.signature(inner.forward).parameters
    lacking = [name for name in ("attention_mask", "position_ids") if name not in taken]
    if lacking:
        return f"it takes no {' and no '.join(lacking)}"
    return None


def known_positions(model: nn.Module) -> int | None:
    """Return how many positions a model knows; None where its configuration does not say.

    Rotary embeddings that depend on the length of the longest row (`dynamic`, `longrope`) would give a row another
    score in other company. They are constant up to a length that the configuration names, and that is the limit here.
    """
    config: Any = _text_config(model)
    known: int | None = getattr(config, "max_position_embeddings", None)
    rope: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
    each = [rope] if "rope_type" in rope else [part for part in rope.values() if isinstance(part, dict)]
    changing = [part for part in each if part.get("rope_type") in ("dynamic", "longrope")]
    switches = [part.get("original_max_position_embeddings") or known for part in changing]
    limits = [limit for limit in (known, *switches) if limit is not None]
    return min(limits) if limits else None


def visible(
    positions: Int[Tensor, "R T"],
    segment: Int[Tensor, "R T"],
    branch: Int[Tensor, "R T"],
    window: int | None = None,
) -> Bool[Tensor, "R T T"]:
    """Return which key (last axis) each query (second axis) may attend to.

    A token sees itself and earlier tokens of its own segment that belong to the prompt or to its own candidate; with a
    window, those of the last `window` positions, counted as if its candidate stood alone behind the prompt. Padding
    sees earlier padding, so that no row of the softmax is empty.
    """
    same_segment = segment[:, :, None] == segment[:, None, :]
    reachable = (branch[:, None, :] == 0) | (branch[:, :, None] == branch[:, None, :])
    width = segment.shape[1]
    causal = torch.ones(width, width, dtype=torch.bool, device=segment.device).tril()
    seen = same_segment & reachable & causal
    if window is None:
        return seen
    return seen & (positions[:, :, None] - positions[:, None, :] < window)


def dense_masks(
    form: MaskForm,
    positions: Int[Tensor, "R T"],
    segment: Int[Tensor, "R T"],
    branch: Int[Tensor, "R T"],
    dtype: torch.dtype,
) -> Masks:
    """Return masks to be added to attention's logits.

    Floats, as eager attention *adds* the mask, so that a boolean one would be silently wrong there, and fused attention
    on a CPU would turn it into floats again in every layer.
    """

    def mask(window: int | None) -> Float[Tensor, "R 1 T T"]:
        hidden = ~visible(positions, segment, branch, window)[:, None]
        return torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, torch.finfo(dtype).min)

    masks: Masks = _by_type(form, mask)
    return masks


def block_masks(
    form: MaskForm, positions: Int[Tensor, "R T"], segment: Int[Tensor, "R T"], branch: Int[Tensor, "R T"]
) -> Masks:
    """Return FlexAttention's block-sparse masks: nothing of size T x T is made on a GPU."""
    rows, width = segment.shape

    def mask(window: int | None) -> BlockMask:
        reach = width if window is None else window
        make = _compiled_block_mask() if segment.is_cuda else create_block_mask
        made: BlockMask = make(
            # What `visible` says. A lambda: torch counts the arguments, which a function checked for types hides.
            lambda row, head, query, key: (  # noqa: ARG005
                (segment[row, query] == segment[row, key])
                & ((branch[row, key] == 0) | (branch[row, query] == branch[row, key]))
                & (query >= key)
                & (positions[row, query] - positions[row, key] < reach)
            ),
            B=rows,
            H=None,
            Q_LEN=width,
            KV_LEN=width,
            device=segment.device,
            BLOCK_SIZE=BLOCK,
        )
        return made

    masks: Masks = _by_type(form, mask)
    return masks


def use_flex(model: nn.Module) -> bool:
    """Make a model attend through FlexAttention, and return whether it can.

    It can't where transformers doesn't vouch for it, nor with heads narrower than FlexAttention's kernels allow.
    """
    chosen: Any = model
    config = _text_config(model)
    heads = config.num_attention_heads
    if not getattr(model, "_supports_flex_attn", False):
        return False
    if (getattr(config, "head_dim", None) or config.hidden_size // heads) < LEAST_HEAD_DIM:
        return False
    AttentionInterface.register(FLEX, _flex_forward)
    AttentionMaskInterface.register(FLEX, _plain_block_mask)
    chosen.set_attn_implementation(FLEX)
    return True


def _plain_block_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    mask_function: Callable[..., Any],
    device: torch.device | str = "cpu",
    **_: Any,
) -> BlockMask:
    """Return the mask that transformers asks for where rows are plain: padding on the right, and no cache."""
    return create_block_mask(mask_function, batch_size, None, q_length, kv_length, device, BLOCK)


def _by_type(form: MaskForm, mask: Callable[[int | None], Any]) -> Any:
    each = {kind: mask(form.window if kind == SLIDING else None) for kind in form.types}
    return each if form.by_type else each[form.types[0]]


def _flex_forward(
    module: nn.Module,  # noqa: ARG001 - transformers' signature
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: BlockMask | None,
    scaling: float | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attend as transformers' attention functions do: [R, heads, T, d] in, [R, T, heads, d] out."""

    cap = None if softcap is None else (lambda score, *_: softcap * torch.tanh(score / softcap))
    attend = _compiled_flex() if query.is_cuda else _eager_flex
    out = attend(
        query,
        key,
        value,
        score_mod=cap,
        block_mask=attention_mask,
        scale=scaling,
        enable_gqa=key.shape[1] != query.shape[1],
    )
    return out.transpose(1, 2).contiguous(), None


def _eager_flex(*tensors: Tensor, **options: Any) -> Tensor:
    """Run without compiling, as where there is no GPU: all logits are made, and there is no backward."""
    attend: Callable[..., Any] = flex_attention
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*flex_attention called without torch.compile.*")
        attended: Tensor = attend(*tensors, **options)
    return attended


@functools.cache
def _compiled_flex() -> Callable[..., Any]:
    # dynamic: else every new width is compiled again, 15 s against 1 ms.
    return torch.compile(flex_attention, dynamic=True)


@functools.cache
def _compiled_block_mask() -> Callable[..., Any]:
    return torch.compile(create_block_mask, dynamic=True)


def _text_config(model: nn.Module) -> Any:
    config: Any = model.config
    return config.get_text_config()
