"""Rows of titles as S-DPO and LLaRA publish them: read to what Parquet of the same content gives, faults named."""

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import fs as pafs

from recray.config import Ingest
from recray.data import reading
from recray.data.items import items_of_titles
from recray.data.logs import cleaned_selections, cleaned_sequences, resolve
from recray.data.reading import CONTENT, FAULT, ROW, File, read_objects
from recray.data.selections import (
    NO_TARGET,
    NOT_CUT,
    TWO_TARGETS,
    holds_selections,
    read_selections,
    split_of,
    titles_of,
)
from recray.errors import DataError

LOCAL = pafs.LocalFileSystem()


def as_file(path: Path) -> File:
    return File(str(path), path.name, path.stat().st_size, 0)


def choice(history: Any, target: Any, candidates: Any) -> dict[str, Any]:
    return {"historyList": history, "itemList": candidates, "trueSelection": target}


ROWS = [
    choice("Boris::Fever Ray", "Hope", ["Hope", "µ-Ziq", "2002"]),
    choice(["Boris", "Fever  Ray ", "Hope"], "2002", ["2002", "Boris"]),
    choice("Fever Ray::Hope::2002", "Boris", "Boris::Hope"),
    choice("Hope", "Boris", None),
]


def write(path: Path, rows: list[Any], *, lines: bool = False) -> File:
    text = "\n".join(json.dumps(row) for row in rows) if lines else json.dumps(rows, indent=4)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return as_file(path)


def table(file: File) -> pa.Table:
    return pa.concat_tables(read_selections(LOCAL, file))


@pytest.mark.parametrize("chunk", [80, 8 * 1024**2])
@pytest.mark.parametrize(("name", "lines"), [("val.json", False), ("val.json", True), ("my-val_2.jsonl.gz", True)])
def test_rows_are_those_of_parquet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, lines: bool, chunk: int
) -> None:
    monkeypatch.setattr(reading, "BLOCK_BYTES", chunk)
    file = write(tmp_path / name, ROWS, lines=lines)
    ids = items_of_titles(titles_of(LOCAL, [file]), 0)["item_id"].combine_chunks()
    as_parquet = {
        "split": ["val"] * 4,
        "user_id": ["validation-0"] * 3 + ["validation-3"],
        "history": [["Boris", "Fever Ray"], ["Boris", "Fever Ray", "Hope"], ["Fever Ray", "Hope", "2002"], ["Hope"]],
        "target": ["Hope", "2002", "Boris", "Boris"],
        "candidates": [["Hope", "µ-Ziq", "2002"], ["2002", "Boris"], ["Boris", "Hope"], None],
        ROW: pa.array(range(4), pa.int64()),
        FAULT: pa.nulls(4, pa.string()),
        CONTENT: pa.nulls(4, pa.string()),
    }
    assert sorted(ids.to_pylist()) == ["2002", "Boris", "Fever Ray", "Hope", "µ-Ziq"]
    found = cleaned_selections(table(file), file, ids)
    assert found.equals(cleaned_sequences(pa.table(as_parquet), file, ids))
    assert found["reason"].null_count == 4
    assert set(found["file"].to_pylist()) == {file.name}, "rows of several files are put in the order of the files"


def test_faults_are_named_by_file_and_row(tmp_path: Path) -> None:
    rows = [
        choice(["a"], "b", ["c", "d"]),
        choice(["a"], "b", ["b", "c", " b"]),
        choice([], "b", ["b"]),
        choice("", "b", ["b"]),
        choice(["a"], None, ["b"]),
        choice(["a"], "b", []),
        choice(["a"], "b", {"b": 1}),
        choice(["a", None], "b", ["b"]),
        [1],
        choice(["a"], "zz", ["zz", "a"]),
        choice(["a"], "b", ["b", "a"]),
    ]
    file = write(tmp_path / "test.json", rows)
    found = cleaned_selections(table(file), file, pa.array(["a", "b", "c"])).to_pylist()
    assert [row["reason"] for row in found] == [
        NO_TARGET, TWO_TARGETS, "missing history", "missing history", "missing target", NO_TARGET, "malformed row",
        "empty title", "malformed row", "target not in the catalogue", None,
    ]  # fmt: skip
    assert [row["row"] for row in found] == list(range(11))
    assert {row["file"] for row in found[:-1]} == {"test.json"}
    assert '"target": "b"' in found[0]["content"]
    assert found[8]["content"] == '"[1]"'
    assert titles_of(LOCAL, [file]) == ["a", "b", "zz"], "a title that only a faulty row has is no item"


def test_a_broken_line_is_set_aside_and_a_broken_list_refused(tmp_path: Path) -> None:
    text = "\n".join(json.dumps(row) for row in ROWS[:2])
    (tmp_path / "train.jsonl").write_text(text + "\n{broken\n" + json.dumps(ROWS[2]))
    faults = table(as_file(tmp_path / "train.jsonl"))
    assert faults[FAULT].to_pylist() == [None, None, "malformed row", None]
    assert faults[CONTENT].to_pylist()[2] == "{broken"
    for broken, where in ((json.dumps(ROWS)[:-9], 3), ("[" + text.replace("\n", ", {]")[:-1] + "]", 1)):
        (tmp_path / "train.json").write_text(broken)
        with pytest.raises(DataError, match=rf"train\.json, row {where}: no JSON"):
            table(as_file(tmp_path / "train.json"))
    (tmp_path / "train.json").write_bytes(json.dumps(ROWS[:1], ensure_ascii=False).encode("latin-1"))
    with pytest.raises(DataError, match=r"train\.json, in or after row 0: no UTF-8"):
        table(as_file(tmp_path / "train.json"))


@given(
    st.lists(
        st.dictionaries(st.text(max_size=3), st.text(max_size=5) | st.integers() | st.none(), max_size=3)
        | st.integers(10)
    ),
    st.integers(1, 40),
    st.sampled_from([None, 2]),
)
def test_a_list_is_read_whole_however_it_is_cut(
    tmp_path_factory: pytest.TempPathFactory, rows: list[Any], chunk: int, indent: int | None
) -> None:
    path = tmp_path_factory.mktemp("cut") / "train.json"
    path.write_text(json.dumps(rows, indent=indent, ensure_ascii=False))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "BLOCK_BYTES", 8 * chunk)
        found = list(read_objects(LOCAL, as_file(path)))
    expected = [(value, "") if isinstance(value, dict) else (None, str(value)) for value in rows]
    assert found == [(row, *each) for row, each in enumerate(expected)]


def test_rows_of_one_history_are_of_one_user(tmp_path: Path) -> None:
    window = ["a", "b", "c", "d", "e", "f"]
    rows = [choice(window[start : start + 3], window[start + 3], window) for start in range(3)]
    rows += [choice(["x", "y"], "a", window), choice(["y"], "a", window), choice(["a"], "b", window)]
    rows += [{**choice(["a", "b"], "c", window), "user_id": 7}]
    users = table(write(tmp_path / "train.json", rows))["user_id"].to_pylist()
    assert users == ["train-0"] * 3 + ["train-3", "train-4", "train-5", "7"]


def test_the_split_is_in_the_name(tmp_path: Path) -> None:
    names = (
        "train_1024.json",
        "lastfm-test.json.gz",
        "dev.jsonl",
        "valid512.json",
        "Validation.json",
        "train-val.json",
    )
    splits = [split_of(File(name, name, 0, 0)) for name in (*names, "latest.json")]
    assert splits == ["train", "test", "validation", "validation", "validation", None, None]
    with pytest.raises(DataError, match=r"latest\.json holds rows of historyList.*its name tells no split"):
        table(write(tmp_path / "latest.json", ROWS))


def test_files_are_found_by_what_they_hold(tmp_path: Path) -> None:
    write(tmp_path / "a-train.json", ROWS)
    write(tmp_path / "a-test.jsonl", ROWS, lines=True)
    (tmp_path / "settings.json").write_text('{"seed": 1}')
    (tmp_path / "more.csv").write_text("user_id,item_id,timestamp\n")
    assert not holds_selections(LOCAL, as_file(tmp_path / "settings.json"))
    source = resolve(Ingest(data=str(tmp_path)))
    assert [file.name for file in source.selections] == ["a-test.jsonl", "a-train.json"]
    assert (source.interactions, source.items, source.sequences) == ((), (), ())
    assert len(resolve(Ingest(data=str(tmp_path / "a-train.json"))).selections) == 1
    with pytest.raises(DataError, match=r"no log in it; .*\.json only with rows of historyList"):
        resolve(Ingest(data=str(tmp_path / "settings.json")))
    (tmp_path / "sequences.jsonl").write_text("{}")
    with pytest.raises(DataError, match=r"which are the published rows: sequences\.jsonl, a-test\.jsonl\?"):
        resolve(Ingest(data=str(tmp_path)))


def test_a_log_of_json_lines_named_for_a_split_stays_a_log(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text('{"user_id": 1, "item_id": 2, "timestamp": 3}\n')
    (tmp_path / "items.csv").write_text("item_id,title\n1,A\n2,B\n")
    source = resolve(Ingest(data=str(tmp_path)))
    assert ([file.name for file in source.interactions], source.selections) == (["train.jsonl"], ())


def test_titles_that_differ_in_spaces_or_composition_are_one(tmp_path: Path) -> None:
    file = write(tmp_path / "test.json", [choice(["Zoe\u0308", "A\u00a0 b"], "c", ["Zo\u00eb", "A b", "c"])])
    assert titles_of(LOCAL, [file]) == ["A b", "Zo\u00eb", "c"]
    items = items_of_titles(titles_of(LOCAL, [file]), 0)
    assert pc.all(pc.equal(items["item_id"], items["label"])).as_py()


def test_a_colon_of_a_title_is_not_taken_for_a_cut(tmp_path: Path) -> None:
    rows = [
        choice("Covenant:::wumpscut:::Hope", "Hope", ["Hope", ":wumpscut:"]),
        choice("x", "Covenant", ["Covenant"]),
        choice("new:::wumpscut:", "Hope", ["Hope"]),
        choice("::", "Hope", ["Hope"]),
    ]
    file = write(tmp_path / "test.json", rows)
    titles = titles_of(LOCAL, [file])
    assert titles == [":wumpscut:", "Covenant", "Hope", "x"]
    found = pa.concat_tables(read_selections(LOCAL, file, set(titles)))
    assert found["history"].to_pylist() == [["Covenant", ":wumpscut:", "Hope"], ["x"], [], ["", ""]]
    assert found[FAULT].to_pylist() == [None, None, NOT_CUT, "empty title"]


def test_a_title_that_looks_like_a_number_stays_a_title(tmp_path: Path) -> None:
    file = write(tmp_path / "test.json", [choice(["9.0", "1.5"], "NaN", ["NaN", "007", "2.0"])])
    ids = items_of_titles(titles_of(LOCAL, [file]), 0)["item_id"].combine_chunks()
    assert sorted(ids.to_pylist()) == ["007", "1.5", "2.0", "9.0", "NaN"]
    row = cleaned_selections(table(file), file, ids).to_pylist()[0]
    assert row["reason"] is None
    assert [ids[item].as_py() for item in (*row["history"], row["target"])] == ["9.0", "1.5", "NaN"]
