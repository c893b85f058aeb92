"""Other ids that a catalogue gives its items: columns of whole numbers, no two alike, nearly all given.

Only the audit reads them. A log may have been sorted by a number that is not the id which it uses, and then that
number tells what comes next.
"""

from collections.abc import Sequence

import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import fs as pafs

from recray.config import Columns
from recray.data.items import item_columns
from recray.data.reading import FAULT, File, column_names, pieces_of, read_piece
from recray.data.values import as_ids, as_text
from recray.schema import OTHER_IDS

MOST_MISSING = 0.01  # of the items: a column that names fewer is no id
_WHOLE_NUMBER = r"^[+-]?\d{1,18}$"


def read_other_ids(fs: pafs.FileSystem, files: Sequence[File], columns: Columns, item_ids: pa.Array) -> pa.Table:
    """Return rows of `OTHER_IDS`: of every item the number it has in each column that is another id.

    Args:
        fs, files: the catalogue, which `items.read_items` has found sound.
        columns: what the user calls id, title and genres; the others are looked at.
        item_ids: in `item` order.
    """
    meant = {file: item_columns(fs, file, columns) for file in files}
    known = {"genres", "tags"}.union(*(each[:3] for each in meant.values()))
    named = [[name for name in column_names(fs, file) if name not in known] for file in files]
    shared = [name for name in named[0] if all(name in names for names in named)] if named else []
    parts = [
        raw.filter(pc.is_null(raw[FAULT])).select([meant[file].item, *shared])
        for file in files
        for piece in pieces_of(fs, file)
        for raw in read_piece(fs, piece, [meant[file].item, *shared])
    ]
    if not shared or not parts:
        return OTHER_IDS.empty_table()
    items = pc.index_in(pa.chunked_array([as_ids(part.column(0))[0] for part in parts]), value_set=item_ids)
    tables = [OTHER_IDS.empty_table()]
    for name in shared:
        numbers = _whole_numbers([part[name] for part in parts])
        if numbers is None or numbers.null_count > MOST_MISSING * len(item_ids):
            continue
        table = pa.table([items.combine_chunks(), pa.array([name] * len(items)), numbers], schema=OTHER_IDS)
        table = table.filter(pc.is_valid(numbers))
        if len(pc.unique(table["number"])) == table.num_rows:
            tables.append(table.sort_by("item"))
    return pa.concat_tables(tables)


def _whole_numbers(chunks: list[pa.ChunkedArray]) -> pa.Array | None:
    """Return a column as whole numbers, null where missing, or None if anything in it is none."""
    if any(pa.types.is_nested(chunk.type) or pa.types.is_temporal(chunk.type) for chunk in chunks):
        return None
    text = pa.chunked_array([as_text(chunk) for chunk in chunks], pa.string()).combine_chunks()
    if not bool(pc.all(pc.match_substring_regex(text, _WHOLE_NUMBER)).as_py()):
        return None
    return pc.cast(pc.replace_substring_regex(text, r"^\+", ""), pa.int64())
