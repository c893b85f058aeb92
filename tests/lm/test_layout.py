"""The layout against its definition: every candidate is scored as if it stood alone behind its prompt."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy import ndarray

from recray.lm.attention import visible
from recray.lm.layout import PADDING, Layout, Segments, candidate_layout, pack, stream_layout
from recray.lm.scorer import to_device


def segments(prompts: list[int], candidates: list[list[int]]) -> Segments:
    """Segments of these lengths; tokens are numbered from 1, so that each is its own name."""
    lengths = [length for own in candidates for length in own]
    total = sum(prompts)
    return Segments(
        prompt_tokens=np.arange(1, 1 + total),
        prompt_lengths=np.array(prompts, dtype=np.int64),
        candidate_tokens=np.arange(1 + total, 1 + total + sum(lengths)),
        candidate_lengths=np.array(lengths, dtype=np.int64),
        candidates_each=np.array([len(own) for own in candidates], dtype=np.int64),
    )


def alone(ragged: Segments) -> list[tuple[list[int], list[int]]]:
    """Prompt and candidate of every candidate, by plain slicing."""
    prompt_ends, ends = np.cumsum(ragged.prompt_lengths), np.cumsum(ragged.candidate_lengths)
    users = np.repeat(np.arange(len(prompt_ends)), ragged.candidates_each)
    return [
        (
            ragged.prompt_tokens[prompt_ends[u] - ragged.prompt_lengths[u] : prompt_ends[u]].tolist(),
            ragged.candidate_tokens[end - length : end].tolist(),
        )
        for u, end, length in zip(users, ends, ragged.candidate_lengths, strict=True)
    ]


def seen_by(layout: Layout, place: int) -> list[tuple[int, int]]:
    """(position, token) of everything that the token at a flat place attends to, in order of position."""
    mask = visible(*(torch.from_numpy(part) for part in (layout.positions, layout.segment, layout.branch))).numpy()
    row, column = divmod(place, layout.tokens.shape[1])
    keys = np.flatnonzero(mask[row, column])
    return sorted(zip(layout.positions[row, keys].tolist(), layout.tokens[row, keys].tolist(), strict=True))


lengths = st.lists(
    st.tuples(st.integers(1, 9), st.lists(st.integers(1, 4), min_size=1, max_size=5)), min_size=1, max_size=6
)


@given(lengths)
def test_each_scored_token_sees_its_own_prompt_and_candidate_and_nothing_else(
    shape: list[tuple[int, list[int]]],
) -> None:
    ragged = segments([prompt for prompt, _ in shape], [own for _, own in shape])
    layout = candidate_layout(ragged)
    for candidate, (prompt, item) in enumerate(alone(ragged)):
        scored = np.flatnonzero(layout.slot == candidate)
        assert layout.label[scored].tolist() == item
        whole = prompt + item
        for step, entry in enumerate(scored.tolist()):
            context = whole[: len(prompt) + step]
            assert seen_by(layout, int(layout.source[entry])) == list(enumerate(context))


@given(st.lists(st.integers(1, 9), min_size=1, max_size=8))
def test_each_token_of_a_stream_but_the_first_is_scored_after_those_before_it(sizes: list[int]) -> None:
    tokens = np.arange(1, 1 + sum(sizes))
    layout = stream_layout(tokens, np.array(sizes))
    ends = np.cumsum(sizes)
    for stream, (end, size) in enumerate(zip(ends, sizes, strict=True)):
        own = tokens[end - size : end].tolist()
        scored = np.flatnonzero(layout.slot == stream)
        assert layout.label[scored].tolist() == own[1:]
        for step, entry in enumerate(scored.tolist()):
            assert seen_by(layout, int(layout.source[entry])) == list(enumerate(own[: step + 1]))


@given(st.lists(st.integers(1, 20), min_size=1, max_size=30))
def test_packed_segments_do_not_overlap_and_rows_are_no_wider_than_the_longest(sizes: list[int]) -> None:
    row, start, (rows, width) = pack(np.array(sizes))
    taken = np.zeros((rows, width), dtype=int)
    for r, first, size in zip(row, start, sizes, strict=True):
        taken[r, first : first + size] += 1
    assert width == max(sizes)
    assert taken.max() == 1
    assert taken.sum() == sum(sizes)


def test_a_small_layout_by_hand() -> None:
    layout = candidate_layout(segments([2], [[2, 1, 3]]))  # 3 4, 5, 6 7 8: the last of each is read by nobody
    assert layout.tokens.tolist() == [[1, 2, 3, 6, 7]]
    assert layout.positions.tolist() == [[0, 1, 2, 2, 3]]
    assert layout.branch.tolist() == [[0, 0, 1, 3, 3]]
    assert layout.source.tolist() == [1, 2, 1, 1, 3, 4]
    assert layout.label.tolist() == [3, 4, 5, 6, 7, 8]
    assert layout.slot.tolist() == [0, 0, 1, 2, 2, 2]
    packed = to_device(layout, "cpu")  # three candidates begin behind one state
    assert packed.state.tolist() == [1, 2, 3, 4]
    assert packed.source.tolist() == [0, 0, 0, 1, 2, 3]
    assert packed.label.tolist() == [3, 5, 6, 4, 7, 8]
    assert packed.slot.tolist() == [0, 1, 2, 0, 2, 2]


def test_padding_belongs_to_no_segment() -> None:
    layout = stream_layout(np.arange(1, 6), np.array([3, 2]))
    assert (layout.segment == PADDING).sum() == 1
    assert layout.tokens.shape == (2, 3)


@pytest.mark.parametrize(
    ("prompts", "own", "named"), [([2, 0], [[1], [1]], "prompt 1"), ([2], [[1, 0]], "candidate 1")]
)
def test_nothing_to_read_or_to_score_is_refused(prompts: list[int], own: list[list[int]], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        candidate_layout(segments(prompts, own))


def test_arrays_are_int64(  # torch indexes with nothing narrower
) -> None:
    layout = candidate_layout(segments([2, 1], [[1, 2], [3]]))
    arrays: list[ndarray] = list(layout[:-2])
    assert {array.dtype for array in arrays} == {np.dtype(np.int64)}
