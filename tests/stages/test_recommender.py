"""What a model is taught, worked out before it is."""

from collections import Counter
from pathlib import Path
from shutil import copytree

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recray.config import LanguageModel, Sft
from recray.data.catalogue import Catalogue
from recray.data.examples import list_arrays
from recray.data.prompts import find_template, training_texts
from recray.data.tokenizer import SMALLEST_VOCABULARY, train_tokenizer
from recray.errors import DataError
from recray.stages.recommender import labels_of, share_untaught, validation_rows
from recray.stages.sft import trained_tokenizer
from recray.workspace import Workspace


@pytest.mark.parametrize(("window", "room"), [(10, 128), (10, 24), (4, 24), (4, 10)])
def test_items_whose_window_is_longer_than_a_prompt_are_counted(prepared: Workspace, window: int, room: int) -> None:
    labels, template = labels_of(prepared), find_template("titles")
    catalogue = Catalogue.build(labels, train_tokenizer(training_texts(template, labels), 300), template, room)
    left_out = total = 0
    for history in list_arrays(prepared.table("sequences", "histories")["items"]):
        for start in range(0, history.size, window):
            items = history[start : start + window]
            tokens = catalogue.prompt(np.zeros(0, dtype=np.int64)).size
            for item in items[::-1]:  # newest first, until one does not fit
                tokens += catalogue.prompt(np.array([item])).size - catalogue.prompt(np.zeros(0, dtype=np.int64)).size
                left_out += tokens > room
            total += items.size
    share = share_untaught(prepared, Sft(window_items=window), catalogue)
    assert share == pytest.approx(left_out / total)
    assert (share > 0) == (room < 128 and window * 3 > room)


def test_titles_met_most_in_training_are_tokens(prepared: Workspace) -> None:
    labels, template = [*labels_of(prepared), "The One Nobody Met"], find_template("titles")
    met = Counter(np.concatenate(list_arrays(prepared.table("sequences", "histories")["items"])).tolist())
    model = LanguageModel(tokens="titles", vocabulary=SMALLEST_VOCABULARY + 20)
    tokenizer = trained_tokenizer(prepared, Sft(model=model), labels)
    lengths = Catalogue.build(labels, tokenizer, template, 64).item_lengths
    whole = {item for item, length in enumerate(lengths.tolist()) if length == 2}  # the end is a token, too
    assert len(whole) == 15
    assert min(met[item] for item in whole) >= max(count for item, count in met.items() if item not in whole)
    everything = model.model_copy(update={"vocabulary": 400})
    lengths = Catalogue.build(
        labels, trained_tokenizer(prepared, Sft(model=everything), labels), template, 64
    ).item_lengths
    assert {item for item, length in enumerate(lengths.tolist()) if length == 2} == set(met)


@pytest.mark.parametrize(
    ("candidates", "message"),
    [([1, 2], "hold the target 0 times"), ([3, 1, 3], "hold the target 2 times"), ([3, 40], "item 40 .* is unknown")],
)
def test_a_faulty_validation_row_is_refused_before_anything_is_fitted(
    prepared: Workspace, tmp_path: Path, candidates: list[int], message: str
) -> None:
    assert len(validation_rows(prepared, 5, seed=0).targets) == 5
    copy = Workspace(str(tmp_path / "copy"))
    copytree(prepared.root, copy.root)
    rows = copy.table("sequences", "validation").to_pylist()
    rows[7] |= {"target": 3, "candidates": candidates}
    pq.write_table(pa.Table.from_pylist(rows), copy.path("sequences", "validation", "part-0.parquet"))
    with pytest.raises(DataError, match=f"sequences/validation, row 7: .*{message}"):
        validation_rows(copy, 5, seed=0)  # also where row 7 is not in the sample
