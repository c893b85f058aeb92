"""Free generation: against a plain loop of whole forward passes, and which texts are an item."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Gemma2Config,
    GenerationConfig,
    GPT2Config,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from recray.data.catalogue import Catalogue
from recray.data.prompts import find_template
from recray.data.tokenizer import encode, train_tokenizer
from recray.lm.attention import FLEX, use_flex
from recray.lm.generate import NO_ITEM, ItemNames, greedy, load_writer, read_items, write_tokens
from recray.lm.load import save_model
from recray.lm.scorer import ItemScorer, lay_out_streams, to_device

Rows = tuple[list[np.ndarray], list[np.ndarray]]

SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,  # so that what comes next depends on what came before
    "pad_token_id": 0,
}
# Rotary positions, learned ones, windows shorter than the prompts, a soft cap; then two that share no prompt.
FAMILIES: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**SMALL),
    "gpt2": GPT2Config(n_embd=32, n_layer=2, n_head=2, initializer_range=0.3),
    "mistral-window": MistralConfig(**SMALL, num_key_value_heads=1, sliding_window=6),
    "gemma2": Gemma2Config(
        **SMALL, num_key_value_heads=1, head_dim=16, sliding_window=6, query_pre_attn_scalar=16,
        attn_logit_softcapping=1.0,
    ),
    "bloom": BloomConfig(hidden_size=32, n_layer=2, n_head=2, initializer_range=0.3),
    "mamba": MambaConfig(hidden_size=32, num_hidden_layers=2, state_size=4, initializer_range=0.3),
}  # fmt: skip
APART = ("bloom", "mamba")


def built(name: str, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    # Tied embeddings would write the last token over and over.
    own = {**FAMILIES[name].to_dict(), "vocab_size": len(tokenizer), "tie_word_embeddings": False}
    config = type(FAMILIES[name]).from_dict(own)
    torch.manual_seed(0)
    made: PreTrainedModel = AutoModelForCausalLM.from_config(config).eval()
    return made


def plainly(model: PreTrainedModel, catalogue: Catalogue, prompt: np.ndarray) -> list[int]:
    """Greedy by definition: the whole text again for every token, no cache, no padding, no mask."""
    tokens, written = prompt.tolist(), list[int]()
    while len(written) < catalogue.item_lengths.max() and written[-1:] != [catalogue.end]:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([tokens + written]), use_cache=False).logits
        written.append(int(logits[0, -1].argmax()))
    return written


@pytest.mark.parametrize("family", list(FAMILIES))
def test_rows_in_company_write_the_likeliest_tokens(
    family: str, tokenizer: PreTrainedTokenizerBase, catalogue: Catalogue, rows: Rows
) -> None:
    model = built(family, tokenizer)
    prompts = [catalogue.prompt(history) for history in rows[0]]
    expected = [plainly(model, catalogue, prompt) for prompt in prompts]
    catalogue.shares_prompt = family not in APART
    greedy(model, catalogue)
    for budget in (1, 10**6):
        written = write_tokens(model, catalogue, prompts, tokens_per_micro_batch=budget)
        assert [row.tolist() for row in written] == expected
    assert len({token for row in expected for token in row}) > 4  # not the same token over and over


def test_writing_ends_with_the_end_token_or_the_longest_item(model: PreTrainedModel, catalogue: Catalogue) -> None:
    prompts = [catalogue.prompt(np.array([item])) for item in range(12)]
    head = model.get_output_embeddings()
    head.bias = torch.nn.Parameter(torch.zeros(head.weight.shape[0]))
    longest = int(catalogue.item_lengths.max())
    for token, expected in ((catalogue.end, [catalogue.end]), (5, [5] * longest)):
        with torch.no_grad():
            head.bias.zero_().index_fill_(0, torch.tensor(token), 1e3)
        written = write_tokens(greedy(model, catalogue), catalogue, prompts, tokens_per_micro_batch=500)
        assert [row.tolist() for row in written] == [expected] * 12
        found = read_items(written, catalogue, ItemNames(catalogue, train_tokenizer(["a"], 260)))
        assert found.ended.tolist() == [token == catalogue.end] * 12
        assert found.items.tolist() == [NO_ITEM] * 12


def test_groups_keep_to_the_budget(
    model: PreTrainedModel, catalogue: Catalogue, rows: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    greedy(model, catalogue)
    shapes: list[tuple[int, ...]] = []
    generate = model.generate

    def seen(**given: Any) -> Any:
        shapes.append(tuple(given["input_ids"].shape))
        return generate(**given)

    monkeypatch.setattr(model, "generate", seen)
    prompts = [catalogue.prompt(history) for history in rows[0] * 3]
    longest = int(catalogue.item_lengths.max())
    budget = 2 * (max(prompt.size for prompt in prompts) + longest) - 1  # short by one token for two of the longest
    write_tokens(model, catalogue, prompts, tokens_per_micro_batch=budget)
    assert sum(height for height, _ in shapes) == 12
    assert max(height for height, _ in shapes) > 1
    assert all(height * (width + longest) <= budget or height == 1 for height, width in shapes)
    shapes.clear()
    catalogue.shares_prompt = False
    write_tokens(model, catalogue, prompts, tokens_per_micro_batch=10**6)
    assert [height for height, _ in shapes] == [1] * 12


def test_a_model_that_packs_by_flex_attention_writes_the_same(
    tokenizer: PreTrainedTokenizerBase, catalogue: Catalogue, rows: Rows
) -> None:
    model = built("llama", tokenizer)
    prompts = [catalogue.prompt(history) for history in rows[0]]
    expected = [plainly(model, catalogue, prompt) for prompt in prompts]
    assert use_flex(model)
    greedy(model, catalogue)
    assert model.config._attn_implementation != FLEX
    written = write_tokens(model, catalogue, prompts, tokens_per_micro_batch=10**6)
    assert [row.tolist() for row in written] == expected


# Which texts are an item

TITLES = ["Fox", "Fox 2", "Foxes", "<end>", "<pad> Fox", "Caf\u00e9", "Owl\ufffd"]


@pytest.fixture(scope="module")
def short() -> PreTrainedTokenizerBase:
    return train_tokenizer(["Fox Fox Fox Owl Owl Owl es es es"], 270)


@pytest.fixture(scope="module")
def named(short: PreTrainedTokenizerBase) -> tuple[Catalogue, ItemNames]:
    catalogue = Catalogue.build(TITLES, short, find_template("titles"), 96)
    return catalogue, ItemNames(catalogue, short)


def test_every_item_is_its_own_tokens(named: tuple[Catalogue, ItemNames]) -> None:
    catalogue, names = named
    assert [names.item(catalogue.item(item)[:-1]) for item in range(len(TITLES))] == list(range(len(TITLES)))
    assert [names.text(catalogue.item(item)[:-1]) for item in range(len(TITLES))] == TITLES


@pytest.mark.parametrize(
    ("text", "item"),
    [
        ("Fox", 0),  # the beginning of two others
        ("Fox 2", 1),
        ("Fo", NO_ITEM),
        ("Fox 2 Fox", NO_ITEM),  # holds two titles
        ("fox", NO_ITEM),
        (" Fox", NO_ITEM),
        ("Fox ", NO_ITEM),
        ("", NO_ITEM),
        ("Caf\u00e9", 5),
        ("Cafe\u0301", NO_ITEM),
    ],
)
def test_a_text_is_an_item_whole_or_not_at_all(
    named: tuple[Catalogue, ItemNames], short: PreTrainedTokenizerBase, text: str, item: int
) -> None:
    letters = [token for letter in text for token in encode(short, [letter], special_text=False)[0]]
    for tokens in (encode(short, [text], special_text=False)[0], letters):
        assert named[1].item(np.array(tokens, dtype=np.int64)) == item
    if item == 0:
        assert letters != named[0].item(0)[:-1].tolist()  # other tokens, the same text


def test_a_title_that_did_not_end_is_no_item(
    named: tuple[Catalogue, ItemNames], short: PreTrainedTokenizerBase
) -> None:
    (fox,) = encode(short, ["Fox"], special_text=False)
    found = read_items([np.array([*fox, named[0].end]), np.array(fox)], *named)
    assert found.texts == ["Fox", "Fox"]
    assert found.ended.tolist() == [True, False]
    assert found.items.tolist() == [0, NO_ITEM]


def test_a_special_token_is_not_the_title_that_spells_it(
    named: tuple[Catalogue, ItemNames], short: PreTrainedTokenizerBase
) -> None:
    (written,) = encode(short, ["<pad> Fox"], special_text=True)
    (spelled,) = encode(short, ["<pad> Fox"], special_text=False)
    assert named[1].text(np.array(written)) == named[1].text(np.array(spelled)) == "<pad> Fox"
    assert named[1].item(np.array(written)) == NO_ITEM
    assert named[1].item(np.array(spelled)) == 4


def test_bytes_that_are_no_letter_are_no_title(
    named: tuple[Catalogue, ItemNames], short: PreTrainedTokenizerBase
) -> None:
    (owl,) = encode(short, ["Owl"], special_text=False)
    (letter,) = encode(short, ["\u00e9"], special_text=False)
    broken = np.array([*owl, letter[0]])  # the first of two bytes
    assert named[1].text(broken) == TITLES[6]
    assert named[1].item(broken) == NO_ITEM


def test_items_that_read_the_same_are_told_apart_by_their_tokens(short: PreTrainedTokenizerBase) -> None:
    class Lossy(ItemNames):
        def _texts(self, rows: Any) -> list[str]:
            return [text.lower() for text in super()._texts(rows)]

    catalogue = Catalogue.build(["Fox", "FOX", "Owl"], short, find_template("titles"), 96)
    names = Lossy(catalogue, short)
    assert [names.item(catalogue.item(item)[:-1]) for item in range(3)] == [0, 1, 2]
    assert names.item(np.array(encode(short, ["fOX"], special_text=False)[0])) == NO_ITEM
    assert names.item(np.array(encode(short, ["oWL"], special_text=False)[0])) == 2


# Folders


def taught(model: PreTrainedModel, catalogue: Catalogue) -> PreTrainedModel:
    """The model after it has learned to begin with item 4 and to go on with item 7."""
    scorer = ItemScorer(model)
    packed = to_device(lay_out_streams(catalogue, [catalogue.prompt(np.array([4, 7])).astype(np.int64)]), "cpu")
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(40):
        optimiser.zero_grad()
        (-scorer(packed).mean()).backward()
        optimiser.step()
    return model


@pytest.fixture
def folder(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, catalogue: Catalogue, tmp_path: Path) -> Path:
    """A model that learned two titles, in a folder whose settings of generation are anything but greedy."""
    save_model(tmp_path, taught(model, catalogue), tokenizer, catalogue)
    settings = GenerationConfig(
        do_sample=True, temperature=9.0, repetition_penalty=4.0, min_new_tokens=40, eos_token_id=7
    )
    settings.save_pretrained(tmp_path)
    return tmp_path


def test_a_model_that_learned_titles_writes_them(folder: Path) -> None:
    histories = [np.array([], dtype=np.int64), np.array([4])]
    written = load_writer(folder, tokens_per_micro_batch=4096)(histories, [np.array([0])] * 2)
    assert written.items.tolist() == [4, 7]
    assert written.ended.all()
    assert written.texts == ["The Owl of Rome 1", "The Owl of Oslo 22"]


def test_candidates_are_shown_where_the_template_shows_them(tmp_path: Path, rows: Rows) -> None:
    titles = [f"Fox {number}" for number in range(12)]
    tokenizer = train_tokenizer(titles, 300)
    catalogue = Catalogue.build(titles, tokenizer, find_template("instruction_candidates"), 800)
    model = built("gpt2", tokenizer)
    save_model(tmp_path, model, tokenizer, catalogue)
    histories, candidates = rows
    names = ItemNames(catalogue, tokenizer)

    def texts(shown: list[np.ndarray]) -> list[str]:
        prompts = [catalogue.prompt(h, c) for h, c in zip(histories, shown, strict=True)]
        written = write_tokens(greedy(model, catalogue), catalogue, prompts, tokens_per_micro_batch=1)
        return read_items(written, catalogue, names).texts

    expected = texts([np.sort(items) for items in candidates])
    for shown in (candidates, [items[::-1] for items in candidates]):
        assert texts(shown) != expected  # the order matters to the model, so it may not tell the target's place
        assert load_writer(tmp_path, tokens_per_micro_batch=4096)(histories, shown).texts == expected
