"""Where tokens go when a prompt is encoded once for all its candidates.

A *segment* is one prompt followed by its candidates. Candidates attend to the prompt and to themselves, never to each
other, and each counts its positions on from the end of the prompt: so each is scored as if it stood there alone.
Segments are packed into rows of equal width without attending to each other; nothing is padded on the left.

Models that can't take several candidates behind one prompt get a *plain* layout: a row a candidate, its prompt before
it, and neither mask nor positions of ours.

Axes:
    U  segments (users)         P  prompt tokens of all segments, end to end
    K  candidates of all segments, segment by segment
    Q  candidate tokens, end to end
    R  rows                     T  tokens of a row
    S  scored tokens
"""

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import numpy as np
from jaxtyping import Int
from numpy import ndarray

PADDING = -1  # segment of padding


class Segments(NamedTuple):
    """Ragged prompts and candidates, as flat tokens and lengths."""

    prompt_tokens: Int[ndarray, " P"]
    prompt_lengths: Int[ndarray, " U"]
    candidate_tokens: Int[ndarray, " Q"]
    candidate_lengths: Int[ndarray, " K"]
    candidates_each: Int[ndarray, " U"]


class Layout(NamedTuple):
    """Packed rows, and which hidden state predicts which token for which score."""

    tokens: Int[ndarray, "R T"]
    positions: Int[ndarray, "R T"]
    segment: Int[ndarray, "R T"]  # number of a token's segment, PADDING for padding
    branch: Int[ndarray, "R T"]  # 0 for the prompt, else 1 + the candidate's number inside its segment
    source: Int[ndarray, " S"]  # flat place (row * T + column) of the hidden state that predicts `label`
    label: Int[ndarray, " S"]
    slot: Int[ndarray, " S"]  # the score that the token's log-probability is added to
    num_scores: int
    plain: bool = False  # one segment a row and no branches: causal attention is all it needs


ARRAYS = tuple(name for name in Layout._fields if name not in ("num_scores", "plain"))

Packing: TypeAlias = Callable[[ndarray], tuple[ndarray, ndarray, tuple[int, int]]]


def candidate_layout(segments: Segments) -> Layout:
    """Return the rows in which every candidate of every segment is scored; slot k is candidate k.

    A candidate's last token is predicted and predicts nothing, so it is in no row.

    Raises:
        ValueError: if a prompt or a candidate has no tokens, naming it.
    """
    _refuse_empty(segments.prompt_lengths, "prompt")
    _refuse_empty(segments.candidate_lengths, "candidate")
    users, prompts, lengths = (
        segments.candidates_each.size,
        segments.prompt_lengths,
        segments.candidate_lengths,
    )
    user_of_candidate = np.repeat(np.arange(users), segments.candidates_each)
    read_total = np.bincount(user_of_candidate, weights=lengths - 1, minlength=users).astype(np.int64)
    row, start, shape = pack(prompts + read_total)
    flat_start = row * shape[1] + start

    prompt_user = np.repeat(np.arange(users), prompts)
    prompt_step = _steps(prompts)
    prompt_place = flat_start[prompt_user] + prompt_step

    number = _steps(segments.candidates_each)  # of a candidate inside its segment
    before = _starts_within(lengths - 1, segments.candidates_each)  # its offset behind the prompt
    candidate = np.repeat(np.arange(lengths.size), lengths)
    step = _steps(lengths)
    user = user_of_candidate[candidate]
    place = flat_start[user] + prompts[user] + before[candidate] + step
    last_of_prompt = flat_start[user] + prompts[user] - 1
    read = step < lengths[candidate] - 1

    places = np.concatenate([prompt_place, place[read]])
    tokens = np.concatenate([segments.prompt_tokens, segments.candidate_tokens[read]])
    return Layout(
        tokens=_fill(shape, places, tokens, 0),
        positions=_fill(shape, places, np.concatenate([prompt_step, (prompts[user] + step)[read]]), 0),
        segment=_fill(shape, places, np.concatenate([prompt_user, user[read]]), PADDING),
        branch=_fill(shape, places, np.concatenate([0 * prompt_step, 1 + number[candidate[read]]]), 0),
        source=np.where(step == 0, last_of_prompt, place - 1),
        label=segments.candidate_tokens.astype(np.int64),
        slot=candidate,
        num_scores=lengths.size,
    )


def separate_layout(segments: Segments) -> Layout:
    """Return plain rows in which every candidate stands alone behind its own copy of the prompt; slot k is candidate k.

    Raises:
        ValueError: if a prompt or a candidate has no tokens, naming it.
    """
    _refuse_empty(segments.prompt_lengths, "prompt")
    _refuse_empty(segments.candidate_lengths, "candidate")
    user = np.repeat(np.arange(segments.candidates_each.size), segments.candidates_each)
    prompts, lengths = segments.prompt_lengths[user], segments.candidate_lengths
    row, _, shape = one_a_row(prompts + lengths - 1)

    copy, prompt_step = np.repeat(row, prompts), _steps(prompts)
    prompt_start = (np.cumsum(segments.prompt_lengths) - segments.prompt_lengths)[user]
    copied = segments.prompt_tokens[np.repeat(prompt_start, prompts) + prompt_step]

    candidate, step = np.repeat(row, lengths), _steps(lengths)
    place = candidate * shape[1] + prompts[candidate] + step
    read = step < lengths[candidate] - 1
    places = np.concatenate([copy * shape[1] + prompt_step, place[read]])
    owner = np.concatenate([copy, candidate[read]])
    return Layout(
        tokens=_fill(shape, places, np.concatenate([copied, segments.candidate_tokens[read]]), 0),
        positions=_fill(shape, places, np.concatenate([prompt_step, (prompts[candidate] + step)[read]]), 0),
        segment=_fill(shape, places, owner, PADDING),
        branch=_fill(shape, places, 0 * owner, 0),
        source=place - 1,
        label=segments.candidate_tokens.astype(np.int64),
        slot=candidate,
        num_scores=lengths.size,
        plain=True,
    )


def stream_layout(tokens: Int[ndarray, " P"], lengths: Int[ndarray, " U"], packing: Packing | None = None) -> Layout:
    """Return the rows in which every token of every stream but its first is scored; slot u is stream u.

    Args:
        tokens: Of all streams, end to end.
        lengths: Tokens of each stream.
        packing: `pack`, the default, or `one_a_row` for a plain layout.

    Raises:
        ValueError: if a stream has no tokens.
    """
    _refuse_empty(lengths, "stream")
    packing = packing or pack
    row, start, shape = packing(lengths)
    user, step = np.repeat(np.arange(lengths.size), lengths), _steps(lengths)
    place = (row * shape[1] + start)[user] + step
    scored = step > 0
    return Layout(
        tokens=_fill(shape, place, tokens, 0),
        positions=_fill(shape, place, step, 0),
        segment=_fill(shape, place, user, PADDING),
        branch=_fill(shape, place, 0 * step, 0),
        source=place[scored] - 1,
        label=tokens[scored].astype(np.int64),
        slot=user[scored],
        num_scores=lengths.size,
        plain=packing is one_a_row,
    )


def pack(lengths: Int[ndarray, " U"]) -> tuple[Int[ndarray, " U"], Int[ndarray, " U"], tuple[int, int]]:
    """Place segments into rows as wide as the longest, first fit by falling length.

    Rows no wider than the longest segment keep dense attention, which is quadratic in the width, no dearer than one
    segment a row; what packing saves is padding.

    Returns:
        The row and the first column of every segment, and the shape (R, T).
    """
    width = int(lengths.max(initial=1))
    row, start = np.zeros(lengths.size, dtype=np.int64), np.zeros(lengths.size, dtype=np.int64)
    used: list[int] = []
    for segment in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[segment])
        fit = next((r for r, taken in enumerate(used) if taken + length <= width), len(used))
        if fit == len(used):
            used.append(0)
        row[segment], start[segment] = fit, used[fit]
        used[fit] += length
    return row, start, (max(1, len(used)), width)


def one_a_row(lengths: Int[ndarray, " U"]) -> tuple[Int[ndarray, " U"], Int[ndarray, " U"], tuple[int, int]]:
    """Place each segment at the start of a row of its own; returns as `pack` does."""
    count = lengths.size
    return np.arange(count), np.zeros(count, dtype=np.int64), (max(1, count), int(lengths.max(initial=1)))


def _steps(lengths: Int[ndarray, " n"]) -> Int[ndarray, " total"]:
    """Return 0 .. length-1 for each length, end to end."""
    ends = np.cumsum(lengths)
    steps: ndarray = np.arange(ends[-1] if ends.size else 0) - np.repeat(ends - lengths, lengths)
    return steps


def _starts_within(lengths: Int[ndarray, " K"], each: Int[ndarray, " U"]) -> Int[ndarray, " K"]:
    """Return for each candidate how many candidate tokens of its own segment come before it."""
    before = np.cumsum(lengths) - lengths
    first = np.cumsum(each) - each
    base = np.concatenate([before, [lengths.sum()]])[first]
    starts: ndarray = before - np.repeat(base, each)
    return starts


def _fill(
    shape: tuple[int, int], place: Int[ndarray, " n"], value: Int[ndarray, " n"], blank: int
) -> Int[ndarray, "R T"]:
    flat = np.full(shape[0] * shape[1], blank, dtype=np.int64)
    flat[place] = value
    return flat.reshape(shape)


def _refuse_empty(lengths: Int[ndarray, " n"], kind: str) -> None:
    empty = np.flatnonzero(lengths < 1)
    if empty.size:
        raise ValueError(f"{kind} {empty[0]} has no tokens; give every {kind} at least one")
