"""Files of a user, read in pieces, so that every row keeps its file and its number.

A Parquet file is read by runs of row groups, a text file (CSV, TSV, RecBole's atomic files, JSONL; compressed or not)
as one piece in blocks of lines. A line that can't be read (bytes that are no UTF-8, another number of fields, no JSON)
comes out with its fault instead of its values: nothing a file holds is lost between reading and cleaning.

Source of the atomic files: https://recbole.io/docs/user_guide/data/atomic_files.html. They are read as its conversion
tools write them: fields joined by tabs, quotes being characters like any other.
"""

import codecs
import difflib
import io
import json
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.json as pajson
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pyarrow import fs as pafs

from recray.errors import DataError

FORMS = {"parquet": "parquet", "csv": "csv", "tsv": "tsv", "jsonl": "jsonl", "ndjson": "jsonl"}
FORMS |= {"inter": "atomic", "item": "atomic", "json": "json"}
COMPRESSIONS = ("gz", "bz2", "zst")
FIELD_TYPES = ("token", "float", "token_seq", "float_seq")  # of an atomic file

ROW, FAULT, CONTENT = "__row", "__fault", "__content"
DECODED = "decoded"  # key of the metadata of tables whose text was cp1252
MALFORMED, BROKEN_ENCODING = "malformed row", "broken encoding"

BLOCK_BYTES = 8 * 1024**2
MOST_OBJECT_CHARACTERS = 4 * 1024**2  # of one element of a JSON list: a longer one is taken for a broken one
PIECE_ROWS = 1_000_000


class File(NamedTuple):
    """One file of a user."""

    path: str  # for the file system it was found on
    name: str  # below the folder that the user named
    size: int
    mtime_ns: int

    @property
    def form(self) -> str:
        """How it is written: parquet, csv, tsv, atomic, jsonl or json."""
        return form_of(self.path) or ""

    @property
    def ending(self) -> str:
        """The end of its name that says how it is written, without that of a compression."""
        return ending_of(self.path)


class Piece(NamedTuple):
    """What one task reads."""

    file: File
    first_row: int = 0
    row_groups: tuple[int, ...] = ()  # of a Parquet file


MOST_LONG_RUNS = 0.05
_NOT_CP1252 = re.compile(rb"[\x81\x8d\x8f\x90\x9d]")
_BEYOND_ASCII = re.compile(rb"[\x80-\xff]+")
_BETWEEN = (re.compile(r"\s*"), re.compile(r"[\s,]*"))  # what may stand before a list, and before its elements


def form_of(path: str) -> str | None:
    """Return how a file is written, by the end of its name, or None where it is no form recray reads.

    Text may be compressed as a whole; Parquet compresses inside, and can't be read through another compression.
    """
    form = FORMS.get(ending_of(path))
    return None if form == "parquet" and path.lower().endswith(COMPRESSIONS) else form


def ending_of(path: str) -> str:
    """Return the end of a file's name below any compression: `inter` of `a/ml-100k.inter.gz`; "" without one."""
    parts = path.rsplit("/", 1)[-1].lower().split(".")
    if len(parts) > 1 and parts[-1] in COMPRESSIONS:
        parts.pop()
    return parts[-1] if len(parts) > 1 else ""


def known_endings() -> str:
    """Return the ends of names that are read, for errors."""
    endings = ", ".join("." + ending for ending in FORMS)
    return f"{endings} (text also compressed, as in .csv.gz: {', '.join('.' + each for each in COMPRESSIONS)})"


def column_names(fs: pafs.FileSystem, file: File) -> list[str]:
    """Return the columns of a file: of its schema, its header, or the objects of its first block.

    Raises:
        DataError: if the file is empty, cut off, or can't be read.
    """
    if file.form == "parquet":
        return list(_open_parquet(fs, file).schema_arrow.names)
    try:
        with _open_stream(fs, file) as stream:
            block = next(_line_blocks(stream), None)
    except (pa.ArrowException, OSError, EOFError) as error:
        raise DataError(f"{file.name} can't be read ({_first_line(error)}); is it cut off?") from None
    if block is None:
        raise DataError(f"{file.name} is empty; expected {'a header and rows' if file.form != 'jsonl' else 'rows'}")
    lines = block[1].split(b"\n")
    if file.form != "jsonl":
        known = _is_utf8(lines[0]) or not is_western(fs, file)
        return _header(file, lines[0] if known else lines[0].decode("cp1252").encode())
    names: dict[str, None] = {}
    for line in lines[:1000]:
        value = _json_object(line)
        names |= dict.fromkeys(value or ())
    return list(names)


def field_types(fs: pafs.FileSystem, file: File) -> dict[str, str]:
    """Return the type of each field of an atomic file, as its header gives it.

    Raises:
        DataError: if a field has no type, or one that RecBole does not know.
    """
    with _open_stream(fs, file) as stream:
        _, block = next(_line_blocks(stream), (0, b""))
    return _typed_header(file, block.split(b"\n")[0])


def pieces_of(fs: pafs.FileSystem, file: File) -> list[Piece]:
    """Return the pieces in which a file is read, in order.

    Raises:
        DataError: if a Parquet file is cut off or no Parquet.
    """
    if file.form != "parquet":
        return [Piece(file)]
    metadata = _open_parquet(fs, file).metadata
    pieces: list[Piece] = []
    groups: list[int] = []
    first = rows = 0
    for group in range(metadata.num_row_groups):
        groups.append(group)
        rows += metadata.row_group(group).num_rows
        if rows >= PIECE_ROWS or group == metadata.num_row_groups - 1:
            pieces.append(Piece(file, first, tuple(groups)))
            first, rows, groups = first + rows, 0, []
    return pieces


def read_piece(fs: pafs.FileSystem, piece: Piece, columns: Sequence[str]) -> Iterator[pa.Table]:
    """Yield the rows of a piece in order: `columns` as far as the file has them, then row, fault and content.

    Raises:
        DataError: naming the file, if its bytes can't be decoded at all.
    """
    try:
        if piece.file.form == "parquet":
            yield from _read_parquet(fs, piece, columns)
        else:
            yield from _read_lines(fs, piece.file, columns)
    except (pa.ArrowException, OSError, EOFError) as error:
        raise DataError(f"{piece.file.name} can't be read ({_first_line(error)}); is it cut off?") from None


def read_objects(fs: pafs.FileSystem, file: File) -> Iterator[tuple[int, dict[str, Any] | None, str]]:
    """Yield the row, the object and "" of every row of a JSON list or of JSON lines, in order and in bounded memory.

    A row that is no object comes as None with its text. After a break in a list no row can be found: that is refused.

    Raises:
        DataError: naming the file and the row, if a JSON list is broken or cut off, or the file can't be read.
    """
    try:
        with _open_stream(fs, file) as stream:
            start = stream.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
        with _open_stream(fs, file) as stream:
            if not start.startswith(b"["):
                for first, block in _line_blocks(stream):
                    lines = enumerate(block.split(b"\n"), first)
                    for row, line in ((row, line) for row, line in lines if line.strip()):
                        value = _json_object(line)
                        yield row, value, "" if value is not None else line.decode(errors="backslashreplace")
                return
            for row, value in enumerate(_list_elements(file, stream)):
                known = isinstance(value, dict)
                yield row, value if known else None, "" if known else json.dumps(value, ensure_ascii=False)
    except (pa.ArrowException, OSError, EOFError) as error:
        raise DataError(f"{file.name} can't be read ({_first_line(error)}); is it cut off?") from None


def is_western(fs: pafs.FileSystem, file: File) -> bool:
    """Return whether a file that is not UTF-8 surely is cp1252, of which Latin-1 is a part.

    It is when no line beyond ASCII is UTF-8, when every byte is a character of cp1252, and when such characters stand
    alone or in twos, as in Western words: other encodings write whole words of them.
    """
    runs = long_runs = 0
    with _open_stream(fs, file) as stream:
        if stream.read(3) == b"\xef\xbb\xbf":  # says that it is UTF-8
            return False
    with _open_stream(fs, file) as stream:
        for _, block in _line_blocks(stream):
            for line in () if block.isascii() else block.split(b"\n"):
                if line.isascii():
                    continue
                if _is_utf8(line) or _NOT_CP1252.search(line):
                    return False
                found = _BEYOND_ASCII.findall(line)
                runs += len(found)
                long_runs += sum(len(run) > 2 for run in found)
    return runs > 0 and long_runs <= MOST_LONG_RUNS * runs


def first_decoded(fs: pafs.FileSystem, file: File) -> tuple[int, str] | None:
    """Return the first row of a file that is read as cp1252 (-1: its header) and its text; None for any other file."""
    if file.form not in ("csv", "tsv", "atomic") or not is_western(fs, file):
        return None
    with _open_stream(fs, file) as stream:
        for first, block in _line_blocks(stream):
            for row, line in enumerate(block.split(b"\n"), first - 1):
                if not line.isascii():
                    return row, line.decode("cp1252").rstrip("\r")
    return None


def nearest(name: str, names: Sequence[str]) -> str:
    """Return how an error lists the columns there are, with the nearest to a missing one first."""
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.0)
    return f"it has: {', '.join(names) or 'none'}" + (f"; the nearest is {near[0]!r}" if near else "")


def _open_parquet(fs: pafs.FileSystem, file: File) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(fs.open_input_file(file.path))
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{file.name} is no whole Parquet file ({_first_line(error)}); is it cut off?") from None


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _read_parquet(fs: pafs.FileSystem, piece: Piece, columns: Sequence[str]) -> Iterator[pa.Table]:
    parquet = _open_parquet(fs, piece.file)
    present = [name for name in columns if name in parquet.schema_arrow.names]
    row = piece.first_row
    for batch in parquet.iter_batches(PIECE_ROWS, row_groups=list(piece.row_groups), columns=present):
        table = pa.Table.from_batches([batch])
        yield _numbered(table, np.arange(row, row + table.num_rows))
        row += table.num_rows


def _numbered(table: pa.Table, rows: NDArray[np.int64]) -> pa.Table:
    nothing = pa.nulls(table.num_rows, pa.string())
    for name, column in ((ROW, pa.array(rows, pa.int64())), (FAULT, nothing), (CONTENT, nothing)):
        table = table.append_column(name, column)
    return table


def _faulty(rows: list[int], faults: list[str], contents: list[str]) -> pa.Table:
    columns = [pa.array(rows, pa.int64()), pa.array(faults, pa.string()), pa.array(contents, pa.string())]
    return pa.table(columns, names=[ROW, FAULT, CONTENT])


def _open_stream(fs: pafs.FileSystem, file: File) -> pa.NativeFile:
    return fs.open_input_stream(file.path)  # detects compression by the name


def _line_blocks(stream: pa.NativeFile) -> Iterator[tuple[int, bytes]]:
    """Yield (number of the first line, whole lines) in blocks of about BLOCK_BYTES."""
    first, rest = 0, b""
    while chunk := stream.read(BLOCK_BYTES):
        if first == 0 and not rest:
            chunk = chunk.removeprefix(b"\xef\xbb\xbf")
        whole, newline, tail = chunk.rpartition(b"\n")
        if not newline:
            rest += chunk
            continue
        block = rest + whole + b"\n"
        rest = tail
        yield first, block
        first += block.count(b"\n")
    if rest:
        yield first, rest + b"\n"


def _header(file: File, line: bytes) -> list[str]:
    if file.form == "atomic":
        return list(_typed_header(file, line))
    try:
        table = pacsv.read_csv(io.BytesIO(line.rstrip(b"\r") + b"\n"), parse_options=_csv_options(file))
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise DataError(f"{file.name} has no header that can be read ({_first_line(error)})") from None
    return list(table.column_names)


def _typed_header(file: File, line: bytes) -> dict[str, str]:
    fields = line.rstrip(b"\r").decode(errors="replace").split("\t")
    types = dict((name, kind) for name, _, kind in (field.rpartition(":") for field in fields))
    wrong = [field for field in fields if field.rpartition(":")[2] not in FIELD_TYPES or ":" not in field[1:]]
    if wrong or len(types) < len(fields):
        told = f"field {wrong[0][:80]!r}" if wrong else "a field twice"
        raise DataError(
            f"{file.name} has {told} in its header; expected NAME:TYPE, fields apart by tabs, as in "
            f"user_id:token, with a type of {', '.join(FIELD_TYPES)}. Other tables with tabs end in .tsv"
        )
    return types


def _csv_options(file: File, **more: Any) -> pacsv.ParseOptions:
    more["quote_char"] = '"' if _has_quotes(file) else False
    return pacsv.ParseOptions(delimiter="," if file.form == "csv" else "\t", **more)


def _has_quotes(file: File) -> bool:
    return file.form in ("csv", "tsv")


def _read_lines(fs: pafs.FileSystem, file: File, columns: Sequence[str]) -> Iterator[pa.Table]:
    has_header = file.form != "jsonl"
    header: list[str] = []
    western: bool | None = None
    with _open_stream(fs, file) as stream:
        for first, block in _line_blocks(stream):
            if western is None and has_header and not _is_utf8(block):
                western = is_western(fs, file)
            if western:
                block = block.decode("cp1252").encode()
            if has_header and first == 0:
                line, _, block = block.partition(b"\n")
                header = _header(file, line)
            first_row = max(first - has_header, 0)
            kept, rows, faults = _sound_lines(block, first_row, quotes=_has_quotes(file))
            if len(rows):
                read = _read_csv_block if has_header else _read_json_block
                for table in read(file, kept, rows, header, columns):
                    yield table.replace_schema_metadata({DECODED: "cp1252"}) if western else table
            if faults.num_rows:
                yield faults


def _sound_lines(block: bytes, first_row: int, *, quotes: bool) -> tuple[bytes, NDArray[np.int64], pa.Table]:
    """Return the lines that can be parsed, their row numbers, and the faulty ones. Blank lines are no rows.

    With `quotes`, a line whose quotes do not close is faulty: it would swallow the lines after it.
    """
    data = np.frombuffer(block, dtype=np.uint8)
    ends = np.flatnonzero(data == ord("\n"))
    starts = np.concatenate([[0], ends[:-1] + 1]).astype(np.int64) if len(ends) else ends
    blank = (ends == starts) | ((ends == starts + 1) & (data[starts] == ord("\r")))
    open_quote = np.zeros(len(ends), dtype=bool)
    if quotes and b'"' in block:
        open_quote = np.add.reduceat((data == ord('"')).astype(np.int64), starts) % 2 == 1
    broken = np.zeros(len(ends), dtype=bool)
    if not _is_utf8(block):
        lines = block.split(b"\n")[:-1]
        broken = np.array([not _is_utf8(line) for line in lines])
    bad = (broken | open_quote) & ~blank
    drop = np.flatnonzero(bad | blank)
    rows = first_row + np.flatnonzero(~(bad | blank))
    if len(drop) == 0:
        return block, rows, _faulty([], [], [])
    keep = np.ones(len(data), dtype=bool)
    for line in drop:
        keep[starts[line] : ends[line] + 1] = False
    which = np.flatnonzero(bad)
    texts = [block[starts[line] : ends[line]].decode(errors="backslashreplace").rstrip("\r") for line in which]
    reasons = [BROKEN_ENCODING if broken[line] else MALFORMED for line in which]
    faults = _faulty([first_row + int(line) for line in which], reasons, texts)
    return data[keep].tobytes(), rows, faults


def _is_utf8(text: bytes) -> bool:
    try:
        text.decode()
    except UnicodeDecodeError:
        return False
    return True


def _read_csv_block(
    file: File, block: bytes, rows: NDArray[np.int64], header: list[str], columns: Sequence[str]
) -> Iterator[pa.Table]:
    """Every column as text: an id such as 007 keeps its zeros."""
    invalid: list[pacsv.InvalidRow] = []

    def skip(row: pacsv.InvalidRow) -> str:
        invalid.append(row)
        return "skip"

    present = [name for name in columns if name in header]
    table = pacsv.read_csv(
        io.BytesIO(block),
        read_options=pacsv.ReadOptions(column_names=header, use_threads=False, block_size=len(block) + 1),
        parse_options=_csv_options(file, invalid_row_handler=skip, ignore_empty_lines=False),
        convert_options=pacsv.ConvertOptions(
            include_columns=present,
            column_types=dict.fromkeys(present, pa.string()),
            null_values=[""],
            strings_can_be_null=True,
        ),
    )
    places = [row.number - 1 for row in invalid]
    yield _numbered(table, np.delete(rows, places))
    if invalid:
        yield _faulty([int(rows[place]) for place in places], [MALFORMED] * len(places), [row.text for row in invalid])


def _read_json_block(
    file: File, block: bytes, rows: NDArray[np.int64], header: list[str], columns: Sequence[str]
) -> Iterator[pa.Table]:
    del file, header
    options = pajson.ReadOptions(use_threads=False, block_size=len(block) + 1)
    try:
        table = pajson.read_json(io.BytesIO(block), read_options=options)
    except pa.ArrowException:
        table = None  # a line that is no object, or a field of two types: read line by line below
    dates = table is not None and any(pa.types.is_timestamp(field.type) for field in table.schema)
    if table is not None and not dates and table.num_rows == len(rows):
        yield _numbered(table.select([name for name in columns if name in table.column_names]), rows)
        return
    yield from _read_json_lines(block, rows, columns)


def _read_json_lines(block: bytes, rows: NDArray[np.int64], columns: Sequence[str]) -> Iterator[pa.Table]:
    lines = block.split(b"\n")[:-1]
    values = [_json_object(line) for line in lines]
    good = [place for place, value in enumerate(values) if value is not None]
    arrays = [_json_column([(values[place] or {}).get(name) for place in good]) for name in columns]
    yield _numbered(pa.table(arrays, names=list(columns)), rows[good])
    bad = [place for place, value in enumerate(values) if value is None]
    if bad:
        texts = [lines[place].decode(errors="backslashreplace") for place in bad]
        yield _faulty([int(rows[place]) for place in bad], [MALFORMED] * len(bad), texts)


def _json_column(values: list[Any]) -> pa.Array:
    if any(isinstance(value, list) for value in values):
        return pa.array([_json_list(value) for value in values])
    return pa.array([_json_text(value) for value in values], pa.string())


def _json_list(value: Any) -> list[str] | None:
    return [_json_text(each) or "" for each in value] if isinstance(value, list) else None


def _json_text(value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return value
    return json.dumps(value)


def _list_elements(file: File, stream: pa.NativeFile) -> Iterator[Any]:
    """Yield the elements of a JSON list, reading on where one is not whole yet."""
    decode, decoder = codecs.getincrementaldecoder("utf-8-sig")().decode, json.JSONDecoder()
    text, place, row, at_end, fault = "", 0, -1, False, "too long"
    while True:
        place = _BETWEEN[row >= 0].match(text, place).end()  # type: ignore[union-attr]  # matches nothing, too
        if text[place : place + 1] == "]" and row >= 0:
            return
        try:
            value, end = ("[", place + 1) if row < 0 and text[place:] else decoder.raw_decode(text, place)
            whole = end < len(text) or at_end or row < 0
        except json.JSONDecodeError as error:
            whole, fault = False, error.msg
        if whole:
            if row >= 0:
                yield value
            row, place = row + 1, end
        elif at_end or len(text) - place > MOST_OBJECT_CHARACTERS:
            raise DataError(
                f"{file.name}, row {row}: no JSON ({fault}); is the file cut off, or the row before broken?"
            )
        else:
            chunk = stream.read(BLOCK_BYTES // 8)
            at_end = not chunk
            try:
                text, place = text[place:] + decode(chunk, at_end), 0
            except UnicodeDecodeError:
                raise DataError(
                    f"{file.name}, in or after row {max(row, 0)}: no UTF-8, which JSON is written in"
                ) from None


def _json_object(line: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except ValueError:  # no JSON, or no UTF-8
        return None
    return value if isinstance(value, dict) else None
