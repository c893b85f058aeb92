"""The catalogue as tokens: each item encoded once, prompts put together from the pieces.

Axes:
    n  items asked for
    H  items of a history
    C  candidates
    T  tokens of a prompt
    t  tokens of one item, end token included
"""

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int
from numpy import ndarray
from transformers import PreTrainedTokenizerBase

from recray.data import prompts
from recray.data.prompts import Frame, Template
from recray.data.tokenizer import boundary_error, encode, encode_after, holds_special
from recray.errors import CatalogueError

_CHECKED_AT_ONCE = 2048  # texts; bounds the memory of `check_boundaries`


class Pieces:
    """Arrays of tokens of unequal lengths, one an item, laid end to end."""

    def __init__(self, rows: Sequence[Sequence[int]]) -> None:
        self.lengths: Int[ndarray, " n"] = np.fromiter(map(len, rows), np.int32, len(rows))
        self.starts: Int[ndarray, " n"] = np.cumsum(self.lengths, dtype=np.int64) - self.lengths
        self.flat: Int[ndarray, " tokens"] = np.fromiter(
            (token for row in rows for token in row), np.int32, int(self.lengths.sum())
        )

    def __getitem__(self, item: int) -> Int[ndarray, " t"]:
        start = self.starts[item]
        return self.flat[start : start + self.lengths[item]]

    def gather(self, items: Int[ndarray, " n"]) -> tuple[Int[ndarray, " tokens"], Int[ndarray, " n"]]:
        """Return the tokens of `items` end to end, and how many each has."""
        lengths = self.lengths[items]
        ends = np.cumsum(lengths, dtype=np.int64)
        shift = np.repeat(self.starts[items] - (ends - lengths), lengths)
        return self.flat[np.arange(len(shift)) + shift], lengths


class Catalogue:
    """The items as tokens under one tokenizer and template; holds no tokenizer, so it pickles fast.

    No item's tokens are the beginning of another's: each holds the end token once, at its end.

    Attributes:
        labels: One unique text an item, in item order.
        num_items: Items, numbered from 0.
        streams: Every item of a history is a target in one pass: a prompt is a start token and then the
            items.
        pad, bos, end: Token ids. `pad` may equal `end` in models that were made without one: mask by length,
            never by id. `bos` is what a text starts with: the end token where the tokenizer has no other.
        item_lengths: [num_items] tokens of each item, end token included.
        shares_prompt: Whether its model takes several candidates behind one prompt; told by whoever opened the model.
        fingerprint: 16 hex digits; changes with labels, their tokens, template and longest prompt.
    """

    def __init__(
        self, labels: Sequence[str], template: Template, max_prompt_tokens: int, pieces: dict[str, Any]
    ) -> None:
        self.labels = tuple(labels)
        self.template = template
        self.max_prompt_tokens = max_prompt_tokens
        self.streams = template.streams
        self.shares_prompt = True
        self.pad, self.bos, self.end = (int(pieces[name]) for name in ("pad", "bos", "end"))
        self._items: Pieces = pieces["items"]
        self._lines: Pieces = pieces["lines"]
        self._opening, self._between, self._cue = (
            np.asarray(pieces[name], dtype=np.int32) for name in ("opening", "between", "cue")
        )
        self.num_items = len(self._items.lengths)
        self.item_lengths: Int[ndarray, " n"] = self._items.lengths
        self.fingerprint = self._print()

    @classmethod
    def build(
        cls,
        labels: Sequence[str],
        tokenizer: PreTrainedTokenizerBase,
        template: Template,
        max_prompt_tokens: int,
    ) -> "Catalogue":
        """Encode every item once.

        Args:
            labels: One unique text an item, in item order.
            tokenizer: Needs an end token, and a chat template for chat prompts.
            template: One of `recray.data.prompts.TEMPLATES`.
            max_prompt_tokens: Longest prompt, in tokens; the oldest items of a history go first.

        Raises:
            CatalogueError: if an item is empty, has the tokens of another or holds the end token; if the
                template's own text leaves no room; if the tokenizer does not fit the template.
        """
        frame = prompts.frame(template, tokenizer)
        pieces = _encoded(frame, labels, tokenizer)
        _check_items(pieces["items"], labels, pieces["end"])
        catalogue = cls(labels, template, max_prompt_tokens, pieces)
        catalogue._room(0)
        return catalogue

    def prompt(self, history: Int[ndarray, " H"], candidates: Int[ndarray, " C"] | None = None) -> Int[ndarray, " T"]:
        """Return the prompt's tokens, int32; the oldest items that don't fit are left out.

        Args:
            history: Items, the latest last; may be empty.
            candidates: Items to show, in this order; not used by templates that show none.

        Raises:
            CatalogueError: if the template shows candidates and there are none, or they leave no room.
        """
        kept = len(history) - self.kept_history(history, candidates)
        return self.put_together(np.asarray(history, dtype=np.int64)[kept:], candidates)

    def put_together(
        self, history: Int[ndarray, " H"], candidates: Int[ndarray, " C"] | None = None
    ) -> Int[ndarray, " T"]:
        """Return the prompt's tokens as `prompt` does, however long."""
        parts = [self._opening, self._lines.gather(history)[0]]
        if self.template.shows_candidates:
            parts += [self._between, self._lines.gather(np.asarray(candidates, dtype=np.int64))[0]]
        return np.concatenate([*parts, self._cue])

    def kept_history(self, history: Int[ndarray, " H"], candidates: Int[ndarray, " C"] | None = None) -> int:
        """Return how many of the latest items of `history` a prompt keeps; H where nothing is cut."""
        room = self._room(self._candidate_tokens(candidates))
        backwards = np.cumsum(self._lines.lengths[np.asarray(history, dtype=np.int64)][::-1], dtype=np.int64)
        return int(np.searchsorted(backwards, room, side="right"))

    def prompt_length(self, history: Int[ndarray, " H"], candidates: Int[ndarray, " C"] | None = None) -> int:
        """Return the number of tokens of `prompt(history, candidates)` without making it."""
        kept = self.kept_history(history, candidates)
        lines = self._lines.lengths[np.asarray(history, dtype=np.int64)[len(history) - kept :]]
        return self._frame_tokens + self._candidate_tokens(candidates) + int(lines.sum())

    def item(self, item: int) -> Int[ndarray, " t"]:
        """Return the tokens of one item as it follows a prompt, end token included."""
        return self._items[item]

    def items(self, items: Int[ndarray, " n"]) -> tuple[Int[ndarray, " tokens"], Int[ndarray, " n"]]:
        """Return the tokens of `items` end to end, end tokens included, and how many each has."""
        return self._items.gather(np.asarray(items, dtype=np.int64))

    def facts(self) -> dict[str, Any]:
        """Return what `recray_prompt.json` beside a model says of its prompts."""
        return {
            "template": self.template.name,
            "version": self.template.version,
            "max_tokens": self.max_prompt_tokens,
            "fingerprint": self.fingerprint,
            "shares_prompt": self.shares_prompt,
        }

    @property
    def _frame_tokens(self) -> int:
        return len(self._opening) + len(self._between) + len(self._cue)

    def _candidate_tokens(self, candidates: Int[ndarray, " C"] | None) -> int:
        if not self.template.shows_candidates:
            return 0
        if candidates is None or len(candidates) == 0:
            raise CatalogueError(
                f"prompt template {self.template.name!r} shows candidates, but a row came without any; use "
                f"{self.template.name.removesuffix('_candidates')!r}"
            )
        return int(self._lines.lengths[np.asarray(candidates, dtype=np.int64)].sum())

    def _room(self, candidate_tokens: int) -> int:
        """Return the tokens left for the history."""
        room = self.max_prompt_tokens - self._frame_tokens - candidate_tokens
        if room < 0:
            raise CatalogueError(
                f"prompt template {self.template.name!r} needs {self._frame_tokens} tokens for its own text "
                f"and {candidate_tokens} for the candidates, more than the {self.max_prompt_tokens} of a "
                f"prompt; raise sft.prompt.max_tokens"
            )
        return room

    def _print(self) -> str:
        template, ids = self.template, [self.pad, self.bos, self.end]
        facts = [template.name, template.version, self.max_prompt_tokens, ids, self.labels]
        whole = hashlib.sha256(json.dumps(facts).encode())
        for pieces in (self._items, self._lines):
            whole.update(pieces.lengths.tobytes())
            whole.update(pieces.flat.tobytes())
        for part in (self._opening, self._between, self._cue):
            whole.update(len(part).to_bytes(8, "little") + part.tobytes())
        return whole.hexdigest()[:16]


def check_boundaries(catalogue: Catalogue, tokenizer: PreTrainedTokenizerBase) -> None:
    """Check for every item that its pieces, put together, are the tokens of the text put together.

    Each item is written after a prompt whose history ends in two other items and itself, and shown among the
    candidates where there are any: encode(prompt) + encode(item) = encode(prompt + item). Items whose label
    spells a special token of the tokenizer are left out: they are read as plain text, which no text says.

    Raises:
        CatalogueError: naming the first item that fails, with both tokenisations.
    """
    frame = prompts.frame(catalogue.template, tokenizer)
    items = np.flatnonzero(~np.array(holds_special(tokenizer, catalogue.labels), dtype=bool))
    # Neighbours from all over the catalogue; a permutation, so each item also comes first in a history.
    others = np.random.default_rng(0).permutation(items)
    for start in range(0, len(items), _CHECKED_AT_ONCE):
        chunk = slice(start, start + _CHECKED_AT_ONCE)
        _check_chunk(catalogue, frame, tokenizer, np.stack([items[chunk], others[chunk]], axis=1))


def _check_chunk(
    catalogue: Catalogue, frame: Frame, tokenizer: PreTrainedTokenizerBase, pairs: Int[ndarray, "n 2"]
) -> None:
    """Check items against their neighbours: [n, 2] (item, other item)."""
    texts, labels = [], catalogue.labels
    for item, other in pairs.tolist():
        prompt = frame.prompt_text([labels[other], labels[item]], [labels[item], labels[other]])
        texts.append(prompt + frame.item_text(labels[item]) + frame.end)
    together = encode(tokenizer, texts, special_text=True)
    for (item, other), whole in zip(pairs.tolist(), together, strict=True):
        prompt_tokens = catalogue.put_together(np.array([other, item]), np.array([item, other]))
        apart = np.concatenate([prompt_tokens, catalogue.item(item)]).tolist()
        if apart != whole:
            what = f"item {item} {labels[item]!r} in a prompt with item {other} {labels[other]!r}"
            raise boundary_error(tokenizer, what, apart, whole)


def _encoded(frame: Frame, labels: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return every piece that a catalogue is made of."""
    for item, label in enumerate(labels):
        if not frame.label(label):
            raise CatalogueError(f"item {item} has an empty title ({label!r}), so nothing names it; give it one")
        if any("\ud800" <= letter <= "\udfff" for letter in label):
            raise CatalogueError(f"item {item} {label!r}: the title is not valid Unicode; mend its encoding")
    end = tokenizer.eos_token_id
    (opening,) = encode(tokenizer, [frame.opening], special_text=True)
    # What stands before a piece: a line of a list before a line and the cue, the cue before an item.
    before_item = frame.end if frame.streams else frame.cue
    texts = [frame.item_text(label) for label in labels]
    items = Pieces([[*tokens, end] for tokens in encode_after(tokenizer, before_item, texts)])
    lines = items
    if not frame.streams:
        lines = Pieces(encode_after(tokenizer, "\n", [frame.line_text(label) for label in labels]))
    return {
        "pad": end if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
        "bos": end if tokenizer.bos_token_id is None else tokenizer.bos_token_id,
        "end": end,
        "opening": opening,
        "between": [] if frame.between is None else _encode_one(tokenizer, frame.between),
        "cue": _encode_one(tokenizer, frame.cue) if frame.cue else [],
        "lines": lines,
        "items": items,
    }


def _encode_one(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Return the tokens of a part of the frame, special tokens read as such, after a line of a list."""
    alone, together = encode(tokenizer, ["\n", "\n" + text], special_text=True)
    if together[: len(alone)] != alone:
        raise boundary_error(tokenizer, f"the prompt's text {text!r} after a line feed", alone, together)
    return together[len(alone) :]


def _check_items(items: Pieces, labels: Sequence[str], end: int) -> None:
    """Refuse items without tokens, with an end token inside, or with the tokens of another."""
    last = items.starts + items.lengths - 1
    inside = np.setdiff1d(np.flatnonzero(items.flat == end), last)
    if len(inside):
        item = int(np.searchsorted(last, inside[0]))
        raise CatalogueError(
            f"item {item} {labels[item]!r}: the tokenizer reads its end token in the title; rename the item"
        )
    seen: dict[bytes, int] = {}
    for item, label in enumerate(labels):
        tokens = items[item]
        if len(tokens) < 2:
            raise CatalogueError(f"item {item} {label!r} has no tokens under this tokenizer; give it another title")
        first = seen.setdefault(tokens.tobytes(), item)
        if first != item:
            raise CatalogueError(
                f"items {first} {labels[first]!r} and {item} {label!r} have the same tokens "
                f"{tokens.tolist()}, so no model could tell them apart; give one another title, or use a "
                f"tokenizer that knows all their letters"
            )
