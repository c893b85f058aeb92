"""The trained tokenizer writes anything and reads it back; encoding behind an anchor keeps pieces apart."""

import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from recray.data.tokenizer import (
    BOS,
    END,
    PAD,
    SMALLEST_VOCABULARY,
    encode,
    encode_after,
    holds_special,
    special_tokens,
    train_tokenizer,
)
from recray.errors import CatalogueError

TEXTS = [f"The {name} Game {year}" for name in ("Blue", "Red", "Old") for year in range(1990, 2000)]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(TEXTS, 320)


def test_special_tokens_come_first_and_have_their_roles(tokenizer: PreTrainedTokenizerFast) -> None:
    assert tokenizer.convert_tokens_to_ids([PAD, BOS, END]) == [0, 1, 2]
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)


def test_the_vocabulary_is_as_asked_or_what_the_texts_support() -> None:
    assert len(train_tokenizer(TEXTS, 280)) == 280
    assert len(train_tokenizer(["ab"], 5000)) == SMALLEST_VOCABULARY + 1  # one merge: a, b


def test_the_same_texts_in_any_order_give_the_same_tokenizer() -> None:
    shuffled = random.Random(0).sample(TEXTS, len(TEXTS))
    first, second = train_tokenizer(TEXTS, 320), train_tokenizer(iter(shuffled), 320)
    assert first.backend_tokenizer.to_str() == second.backend_tokenizer.to_str()


def test_frequent_words_become_one_token(tokenizer: PreTrainedTokenizerFast) -> None:
    assert tokenizer.convert_ids_to_tokens(encode(tokenizer, ["x Game"], special_text=True)[0]) == ["x", "ĠGame"]


WHOLE = ["The Blue Game 1991", "<end>", "Am\u00e9lie  (2001)", "The Blue Game 1991", "Game", "Late"]


@pytest.fixture(scope="module")
def titled() -> PreTrainedTokenizerFast:
    return train_tokenizer(TEXTS, SMALLEST_VOCABULARY + 40, whole=WHOLE)


def test_a_whole_text_is_one_token_and_others_are_pieces_of_words(titled: PreTrainedTokenizerFast) -> None:
    first, third, game, other = encode(
        titled, ["The Blue Game 1991", "Am\u00e9lie  (2001)", "Game", "The Red Game 1994"], special_text=False
    )
    assert [len(first), len(third), len(game)] == [1, 1, 1]
    assert len(other) > 1
    assert titled.decode([*first, *third, *other]) == "The Blue Game 1991Am\u00e9lie  (2001)The Red Game 1994"
    # A title's tokens do not change with the titles around it: special tokens part them.
    (stream,) = encode(titled, [f"{BOS}The Blue Game 1991{END}The Red Game 1994"], special_text=True)
    assert stream == [titled.bos_token_id, *first, titled.eos_token_id, *other]
    # Inside of another text it is none.
    (inside,) = encode(titled, ["The Blue Game 19910"], special_text=False)
    assert first[0] not in inside
    assert titled.decode(inside) == "The Blue Game 19910"


def test_most_of_the_vocabulary_may_be_whole_texts_the_first_of_them() -> None:
    names = [f"{letter}{letter} x" for letter in "abcdefghij"]
    few = train_tokenizer(TEXTS, SMALLEST_VOCABULARY + 8, whole=names)
    lengths = [len(tokens) for tokens in encode(few, names, special_text=False)]
    assert lengths[:6] == [1] * 6
    assert min(lengths[6:]) > 1
    assert len(few) == SMALLEST_VOCABULARY + 8
    # What whole texts do not take is there for pieces.
    assert len(train_tokenizer(TEXTS, SMALLEST_VOCABULARY + 20, whole=names[:2])) == SMALLEST_VOCABULARY + 20


def test_a_whole_text_that_spells_a_special_token_is_text(titled: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    titled.save_pretrained(tmp_path)
    for one in (titled, AutoTokenizer.from_pretrained(tmp_path)):
        special = {one.pad_token_id, one.bos_token_id, one.eos_token_id}
        assert len(special) == 3
        assert max(special) == len(one) - 1
        (tokens,) = encode(one, ["<end>"], special_text=False)
        assert not special & set(tokens)
        assert one.decode(tokens) == "<end>"
        assert encode(one, ["<end>"], special_text=True) == [[one.eos_token_id]]
        assert len(encode(one, ["The Blue Game 1991"], special_text=False)[0]) == 1


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_is_read_back_by_a_tokenizer_with_whole_texts(titled: PreTrainedTokenizerFast, text: str) -> None:
    (tokens,) = encode(titled, [text], special_text=False)
    assert not {titled.pad_token_id, titled.bos_token_id, titled.eos_token_id} & set(tokens)
    assert titled.decode(tokens) == text


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_is_read_back_as_it_was(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    (tokens,) = encode(tokenizer, [text], special_text=False)
    assert not {0, 1, 2} & set(tokens)
    assert tokenizer.decode(tokens) == text


def test_a_vocabulary_without_room_for_the_bytes_is_refused() -> None:
    with pytest.raises(CatalogueError, match=r"vocabulary of 258 tokens is too small.* 259"):
        train_tokenizer(TEXTS, 258)


def test_special_text_is_a_token_or_text_as_asked(tokenizer: PreTrainedTokenizerFast) -> None:
    assert encode(tokenizer, ["<end>"], special_text=True) == [[2]]
    assert 2 not in encode(tokenizer, ["<end>"], special_text=False)[0]
    assert encode(tokenizer, ["<end>"], special_text=True) == [[2]]  # the setting does not stick
    assert encode(tokenizer, [], special_text=True) == []


def test_reserved_special_tokens_are_found_too() -> None:
    tokenizer = train_tokenizer(TEXTS, 320)
    tokenizer.backend_tokenizer.add_special_tokens(["<reserved>"])
    assert set(special_tokens(tokenizer)) == {PAD, BOS, END, "<reserved>"}
    assert holds_special(tokenizer, ["a <reserved> b", "reserved"]) == [True, False]


@given(st.lists(st.sampled_from(["A", " b", "<end>", "c<pad>", "\n", " 1990"]), max_size=5))
def test_tokens_after_an_anchor_are_those_of_the_whole_less_the_anchor(
    tokenizer: PreTrainedTokenizerFast, texts: list[str]
) -> None:
    after = encode_after(tokenizer, "<bos>Next:", texts)
    (anchor,) = encode(tokenizer, ["Next:"], special_text=False)
    wholes = encode(tokenizer, ["Next:" + text for text in texts], special_text=False)
    assert [anchor + tokens for tokens in after] == wholes


def test_a_text_that_spells_special_tokens_is_not_glued_to_a_special_anchor() -> None:
    tokenizer = train_tokenizer([*TEXTS, *["a>>b"] * 50], 320)
    (text,) = encode(tokenizer, [">b <end>"], special_text=False)
    assert encode_after(tokenizer, "x<end>", [">b <end>"]) == [text]


def test_an_anchor_that_merges_with_what_follows_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(CatalogueError, match=r"the text 'Game' after 'x '.*'Ġ'\].*'ĠGame'\].*merges across"):
        encode_after(tokenizer, "x ", ["Game"])
