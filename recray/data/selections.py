"""Evaluation rows as S-DPO, LLaRA and what was built on them publish them: titles to choose one from.

    {"historyList": ["A", "B"] or "A::B", "itemList": ["C", "D", ...], "trueSelection": "C"}

A file is a JSON list or JSON lines, and names its split: train*.json, lastfm-val.json, test.jsonl.gz. The rows name
items by their titles and users not at all. Two items with one title can't be told apart here, so they are one. A row
whose history is the one before with its target added, as windows over one history are written, is of the same user.
A text such as `:wumpscut:::Covenant` is cut where both sides are titles that other rows have.

Source: https://github.com/chenyuxin1999/S-DPO, data/prepare_sft_data.py and softmax_dpo.py.
"""

import itertools
import re
import unicodedata
from collections.abc import Iterator, Sequence, Set
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import fs as pafs

from recray.data.reading import CONTENT, FAULT, MALFORMED, ROW, File, read_objects
from recray.errors import DataError

HISTORY, CANDIDATES, TARGET = FIELDS = ("historyList", "itemList", "trueSelection")
SEPARATOR = "::"  # where a list is written as one text
NO_TARGET, TWO_TARGETS = "target not among the candidates", "target twice among the candidates"
EMPTY_TITLE = "empty title"
NOT_CUT = "history that can't be cut into known titles in one way"
ROWS_PER_TABLE = 8192
LEAST_OVERLAP = 2  # titles a history must share with the row before to be its user's: one may be chance

RAW = pa.schema(
    [
        ("split", pa.string()),
        ("user_id", pa.string()),
        ("history", pa.list_(pa.string())),
        ("target", pa.string()),
        ("candidates", pa.list_(pa.string())),
        (ROW, pa.int64()),
        (FAULT, pa.string()),
        (CONTENT, pa.string()),
    ]
)
_WORDS = {"train": "train", "training": "train", "test": "test", "testing": "test"}
_WORDS |= dict.fromkeys(("val", "valid", "validation", "dev"), "validation")


def split_of(file: File) -> str | None:
    """Return the split that a file names, None where it names none or several.

    >>> split_of(File("x", "lastfm-val.json", 0, 0)), split_of(File("x", "train1024.jsonl.gz", 0, 0))
    ('validation', 'train')
    """
    stem = file.name.rsplit("/", 1)[-1].split(".")[0].lower()
    named = {_WORDS[word] for word in re.findall("[a-z]+", stem) if word in _WORDS}
    return named.pop() if len(named) == 1 else None


def holds_selections(fs: pafs.FileSystem, file: File) -> bool:
    """Return whether one of a file's first rows has at least two of the three fields."""
    try:
        first = [value or {} for _, value, _ in itertools.islice(read_objects(fs, file), 5)]
    except DataError:
        return False
    return any(sum(field in value for field in FIELDS) >= 2 for value in first)


def read_selections(fs: pafs.FileSystem, file: File, known: Set[str] = frozenset()) -> Iterator[pa.Table]:
    """Yield rows of `RAW`, one a row of the file and in its order, with a fault where there is one.

    `known` titles decide where a text is cut whose titles may begin or end with a colon. Users are named by split
    and first row. Titles are read in Unicode's composed form, with single spaces.

    Raises:
        DataError: naming the file, if its name tells no split, or its JSON is broken.
    """
    split = split_of(file)
    if split is None:
        raise DataError(
            f"{file.name} holds rows of {', '.join(FIELDS)}, but its name tells no split; name it train*.json, "
            "val*.json, valid*.json, dev*.json or test*.json"
        )
    rows: list[tuple[Any, ...]] = []
    user, full = "", list[str]()  # of the row before: its history with its target
    for row, value, text in read_objects(fs, file):
        history, target, candidates, fault = _parts(value, known)
        goes_on = len(history) >= LEAST_OVERLAP and len(full) - len(history) in (0, 1)
        if not (goes_on and history == full[len(full) - len(history) :]):
            user = f"{split}-{row}"
        full = [*history, target] if history and target else []
        given = (value or {}).get("user_id")
        named = str(given) if given is not None else user
        rows.append((split, named, history, target, candidates, row, fault, text or None))
        if len(rows) == ROWS_PER_TABLE:
            yield _table(rows)
            rows = []
    if rows:
        yield _table(rows)


def titles_of(fs: pafs.FileSystem, files: Sequence[File]) -> list[str]:
    """Return the distinct titles of all sound rows, sorted; of histories not cut yet, those that other rows have."""
    titles: set[str] = set()
    for file in files:
        for table in read_selections(fs, file):
            sound = table.filter(pc.or_(table[FAULT].is_null(), pc.fill_null(pc.equal(table[FAULT], NOT_CUT), False)))
            for column in (pc.list_flatten(sound["history"]), pc.list_flatten(sound["candidates"]), sound["target"]):
                titles.update(column.unique().to_pylist())
    return sorted(titles)


def _table(rows: list[tuple[Any, ...]]) -> pa.Table:
    return pa.table([list(column) for column in zip(*rows, strict=True)], schema=RAW)


def _parts(value: dict[str, Any] | None, known: Set[str]) -> tuple[list[str], str | None, list[str] | None, str | None]:
    """Return history, target, candidates (None where none are published), and what is wrong with the row."""
    if value is None:
        return [], None, None, MALFORMED
    history, candidates = _titles(value.get(HISTORY) or [], known), _titles(value.get(CANDIDATES), known)
    target = _title(value.get(TARGET))
    fault = None
    uncut = history == [] and str(value.get(HISTORY) or "").strip() not in ("", "[]")
    if history is None or (candidates is None and value.get(CANDIDATES) is not None):
        fault = MALFORMED
    elif not history and not uncut:
        fault = "missing history"
    elif not target:
        fault = "missing target"
    elif "" in history or "" in (candidates or []):
        fault = EMPTY_TITLE
    elif candidates is not None and candidates.count(target) != 1:
        fault = NO_TARGET if target not in candidates else TWO_TARGETS
    elif uncut:
        fault = NOT_CUT
    return history or [], target or None, candidates, fault


def _titles(value: Any, known: Set[str]) -> list[str] | None:
    if isinstance(value, str):
        if SEPARATOR + ":" in value:
            return _cut(value, known)
        value = value.split(SEPARATOR) if value.strip() else []
    return [_title(each) for each in value] if isinstance(value, list) else None


def _cut(text: str, known: Set[str]) -> list[str]:
    """Return the one way to cut a text into known titles; nothing where there is none, or more than one.

    >>> _cut(":a:::b::c", {":a:", "b", "c"}), _cut("a:::b", {"a:", "a", "b", ":b"})
    ([':a:', 'b', 'c'], [])
    """
    ends = [found.start() for found in re.finditer(f"(?={SEPARATOR})", text)]
    ways: dict[int, list[list[str]]] = {0: [[]]}  # where a part may begin: up to two ways to have come there
    for end in [*ends, len(text)]:
        found = [
            [*way, title]
            for begin in ways
            if begin < end and (title := _title(text[begin:end])) in known
            for way in ways[begin]
        ]
        if found:
            ways[end + len(SEPARATOR)] = found[:2]
    whole = ways.get(len(text) + len(SEPARATOR), [])
    return whole[0] if len(whole) == 1 else []


def _title(value: Any) -> str:
    text = str(value) if isinstance(value, str | int | float) else ""
    return " ".join(unicodedata.normalize("NFC", text).split())
