"""Softmax losses over the catalogue, summed over tokens.

Axes:
    T  tokens: (state, next item) pairs of a batch
    D  width of states and item vectors
    I  items of the catalogue
    S  sampled negatives, shared by a batch
    P  negatives of a token's own

Each returns a sum, so that the caller may divide by the token count of the global batch.
"""

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

LOGITS_AT_ONCE = (
    1 << 20
)  # 4 MiB of float32, so that a chunk stays in the cache; larger ones took up to 1.7 times as long


def full_softmax(
    states: Float[Tensor, "T D"],
    items: Float[Tensor, "I D"],
    targets: Int[Tensor, " T"],
    *,
    logits_at_once: int = LOGITS_AT_ONCE,
) -> Float[Tensor, ""]:
    r"""Return the summed cross-entropy of the targets among all items, in nats.

        sum_t  log sum_i exp(h_t . v_i)  -  h_t . v_{y_t}

    Equal to `cross_entropy(states @ items.T, targets, reduction="sum")`, with the memory of one chunk: T * I logits
    (430 MB at 6,400 tokens and 16,859 items) are never held. Its gradient is found with the value, chunk by chunk,
    so nothing is computed twice.

    Args:
        states: [T, D] h, one a token.
        items: [I, D] v, the whole catalogue.
        targets: [T] y, the item that came next.
        logits_at_once: Most logits of a chunk; at least one token's.
    """
    chunk = max(1, logits_at_once // len(items))
    value: Tensor = _FullSoftmax.apply(states, items, targets, chunk)  # type: ignore[no-untyped-call]
    return value


class _FullSoftmax(torch.autograd.Function):
    """Value and gradient in one sweep over chunks of tokens."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, items: Tensor, targets: Tensor, chunk: int) -> Tensor:
        wanted = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        grad_states = torch.empty_like(states) if wanted else None
        grad_items = torch.zeros_like(items) if wanted else None
        total = torch.zeros((), dtype=states.dtype, device=states.device)
        # One buffer for all chunks: fresh memory for each costs more than the product that fills it.
        buffer = states.new_empty(min(chunk, len(states)), len(items))
        for place in range(0, len(states), chunk):
            state, target = states[place : place + chunk], targets[place : place + chunk]
            logits = torch.mm(state, items.T, out=buffer[: len(state)])
            positive = logits.gather(1, target[:, None])[:, 0]
            largest = logits.amax(dim=1)
            weights = logits.sub_(largest[:, None]).exp_()
            norm = weights.sum(dim=1)
            total += (norm.log() + largest - positive).sum()
            if grad_states is None or grad_items is None:
                continue
            # softmax - one-hot, the softmax left unnormalised in place and its norm moved to the smaller factor.
            grad_states[place : place + chunk] = (weights @ items) / norm[:, None] - items[target]
            grad_items.addmm_(weights.T, state / norm[:, None])
            grad_items.index_add_(0, target, state, alpha=-1)
        ctx.save_for_backward(grad_states, grad_items)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        grad_states, grad_items = ctx.saved_tensors
        return grad_states * grad, grad_items * grad, None, None


def sampled_softmax(
    states: Float[Tensor, "T D"],
    items: Float[Tensor, "I D"],
    targets: Int[Tensor, " T"],
    negatives: Int[Tensor, " S"],
    log_expected: Float[Tensor, " S"],
) -> Float[Tensor, ""]:
    r"""Return the summed cross-entropy of the targets among themselves and a sample of the catalogue, in nats.

        sum_t  log( exp(h_t . v_{y_t})  +  sum_{s: n_s != y_t} exp(h_t . v_{n_s} - log(S q_{n_s})) )  -  h_t . v_{y_t}

    The correction by log(S q) makes the sum inside the logarithm an unbiased estimate of the full softmax's; a
    negative that is the target is left out, as the target is there already. With every item drawn once and
    S q = 1 it is the full softmax.

    Args:
        states: [T, D] h, one a token.
        items: [I, D] v, the whole catalogue.
        targets: [T] y, the item that came next.
        negatives: [S] n, drawn with replacement, shared by all tokens.
        log_expected: [S] log(S q_n): how often n was to be expected in the sample.
    """
    positive = (states * items[targets]).sum(dim=1)
    logits = states @ items[negatives].T - log_expected
    logits = logits.masked_fill(negatives == targets[:, None], -torch.inf)
    every = torch.cat([positive[:, None], logits], dim=1)
    return (every.logsumexp(dim=1) - positive).sum()


def hardest_softmax(
    states: Float[Tensor, "T D"],
    items: Float[Tensor, "I D"],
    targets: Int[Tensor, " T"],
    negatives: Int[Tensor, " S"],
    hardest: int,
) -> Float[Tensor, ""]:
    r"""Return the summed cross-entropy of the targets among themselves and their hardest negatives, in nats.

        sum_t  log( exp(h_t . v_{y_t})  +  sum_{s in A_t} exp(h_t . v_{n_s}) )  -  h_t . v_{y_t}

    A_t are the `hardest` of the sample with the highest scores now, without the target; all of it where it is smaller.
    Nothing is corrected for how often an item is drawn: what is kept of a sample is chosen by score, so the sum stands
    for no sum over the catalogue.

    Args:
        states: [T, D] h, one a token.
        items: [I, D] v, the whole catalogue.
        targets: [T] y, the item that came next.
        negatives: [S] n, each once, shared by all tokens.
        hardest: A, how many are kept for each token.

    Reference: Prakash et al., "Evaluating Performance and Bias of Negative Sampling in Large-Scale Sequential
    Recommendation Models", https://arxiv.org/abs/2410.17276.
    """
    positive = (states * items[targets]).sum(dim=1)
    logits = (states @ items[negatives].T).masked_fill(negatives == targets[:, None], -torch.inf)
    kept = logits.topk(min(hardest, len(negatives)), dim=1).values
    every = torch.cat([positive[:, None], kept], dim=1)
    return (every.logsumexp(dim=1) - positive).sum()


def listed_softmax(
    states: Float[Tensor, "T D"],
    items: Float[Tensor, "I D"],
    targets: Int[Tensor, " T"],
    negatives: Int[Tensor, "T P"],
    usable: Bool[Tensor, "T P"],
) -> Float[Tensor, ""]:
    r"""Return the summed cross-entropy of the targets among themselves and negatives of their own, in nats.

        sum_t  log( exp(h_t . v_{y_t})  +  sum_{p usable} exp(h_t . v_{n_tp}) )  -  h_t . v_{y_t}

    0, without a gradient, for a token that has no usable negative. Nothing is corrected for how often an item is drawn,
    as in `hardest_softmax`.

    Args:
        states: [T, D] h, one a token.
        items: [I, D] v, the whole catalogue.
        targets: [T] y, the item that came next.
        negatives: [T, P] n.
        usable: [T, P] which of them count; of what is not, no gradient comes.
    """
    positive = (states * items[targets]).sum(dim=1)
    logits = torch.einsum("td,tpd->tp", states, items[negatives]).masked_fill(~usable, -torch.inf)
    every = torch.cat([positive[:, None], logits], dim=1)
    return (every.logsumexp(dim=1) - positive).sum()
