"""What a causal language model writes after a prompt when nothing holds it to the catalogue, and which item that is.

Writing is greedy: at every place the likeliest token, up to the end token or the length of the longest item. It is what
S-DPO and LLaRA score; they look for titles inside the text, here the whole text is an item or it is none.

Axes:
    R  rows    T  tokens of the longest prompt of a group    t  tokens of one text
"""

from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Int
from numpy import ndarray
from torch import Tensor
from transformers import GenerationConfig

from recray.data.catalogue import Catalogue
from recray.lm.attention import FLEX
from recray.lm.load import Model, Tokenizer, load_tokenizer, open_recommender, stored_dtype
from recray.lm.scorer import groups_by_tokens

NO_ITEM = -1
UNREADABLE = "\ufffd"  # stands for bytes that are no letter: different bytes, one text

Writer = Callable[[list[ndarray], list[ndarray]], "Written"]


class Written(NamedTuple):
    """What a model wrote behind some prompts."""

    texts: list[str]  # [R], without the end token
    ended: Bool[ndarray, " R"]  # whether it wrote the end token in time
    items: Int[ndarray, " R"]  # the item that each text is, `NO_ITEM` where it is none


class ItemNames:
    """Which item a text is: the one with these very tokens, else the one with this very text.

    A title written with other tokens than the tokenizer's own reads the same, so it is that item. A text that holds a
    special token is not the title that spells it. Two items that read the same are told apart by their tokens alone.
    """

    def __init__(self, catalogue: Catalogue, tokenizer: Tokenizer) -> None:
        self._catalogue = catalogue
        self._tokenizer = tokenizer
        added = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._special = added | set(tokenizer.all_special_ids)
        self._by_tokens = {catalogue.item(item)[:-1].tobytes(): item for item in range(catalogue.num_items)}

    def text(self, tokens: Int[ndarray, " t"]) -> str:
        """Return what the tokens say, special tokens written out."""
        return self._texts([tokens])[0]

    def item(self, tokens: Int[ndarray, " t"]) -> int:
        """Return the item that these tokens, the end token left out, are; `NO_ITEM` if they are none."""
        found = self._by_tokens.get(np.asarray(tokens, dtype=np.int32).tobytes())
        if found is not None:
            return found
        text = self.text(tokens)
        if UNREADABLE in text or not self._special.isdisjoint(tokens.tolist()):
            return NO_ITEM
        return self._by_text.get(text, NO_ITEM)

    @cached_property
    def _by_text(self) -> dict[str, int]:
        """Texts of all items as their tokens read; made when a model first writes other tokens than an item's."""
        found: dict[str, int] = {}
        every = self._texts([self._catalogue.item(item)[:-1] for item in range(self._catalogue.num_items)])
        for item, text in enumerate(every):
            found[text] = NO_ITEM if text in found else item
        return found

    def _texts(self, rows: list[ndarray]) -> list[str]:
        found: list[str] = self._tokenizer.batch_decode(
            [row.tolist() for row in rows], skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return found


def greedy(model: Model, catalogue: Catalogue) -> Model:
    """Return the model, set to write items greedily: whatever its folder says of sampling or penalties is dropped."""
    model.generation_config = GenerationConfig(
        do_sample=False,
        max_new_tokens=int(catalogue.item_lengths.max()),
        eos_token_id=catalogue.end,
        pad_token_id=catalogue.pad,
    )
    if model.config._attn_implementation == FLEX:
        # Ours counts queries from the first token, and with a cache there is only the last one. Fused attention knows
        # no soft cap.
        capped = getattr(model.config.get_text_config(), "attn_logit_softcapping", None)
        model.set_attn_implementation("eager" if capped else "sdpa")
    return model.eval()


def write_tokens(
    model: Model, catalogue: Catalogue, prompts: list[ndarray], *, tokens_per_micro_batch: int
) -> list[ndarray]:
    """Return the tokens that a `greedy` model writes after each prompt, up to the end token, which is kept.

    Prompts are filled up on the left to the longest of their group; a group's prompts and texts keep to the budget of
    tokens. A model that shares no prompt may carry a state over padding, or count it as places: it gets one row at a
    time. A row alone and in company writes the same, unless two tokens are as likely to within rounding.
    """
    longest = int(catalogue.item_lengths.max())
    lengths = np.array([prompt.size + longest for prompt in prompts], dtype=np.int64)
    budget = tokens_per_micro_batch if catalogue.shares_prompt else 1
    found: list[ndarray] = [np.zeros(0, dtype=np.int64)] * len(prompts)
    for group in groups_by_tokens(lengths, budget):
        tokens, mask = _padded_left([prompts[row] for row in group], catalogue.pad, model.device)
        with torch.inference_mode():
            written: Any = model.generate(input_ids=tokens, attention_mask=mask)
        for row, own in zip(group, written[:, tokens.shape[1] :].cpu().numpy(), strict=True):
            found[row] = own[: _length(own, catalogue.end)]
    return found


def load_writer(folder: Path, *, tokens_per_micro_batch: int) -> Writer:
    """Return a function from histories and candidates to what a recommender's folder writes.

    A template that shows candidates shows a row's by rising item number, as in `recray.lm.scorer.segments_of`; others
    do not look at them.

    Raises:
        ModelError, CatalogueError: if the folder is not a recommender that recray wrote whole.
    """
    model, catalogue = open_recommender(folder, dtype=stored_dtype(folder))
    if torch.cuda.is_available():
        model.cuda()
    greedy(model, catalogue)
    names = ItemNames(catalogue, load_tokenizer(folder))

    def write(histories: list[ndarray], candidates: list[ndarray]) -> Written:
        prompts = [
            catalogue.prompt(history, np.sort(items)) for history, items in zip(histories, candidates, strict=True)
        ]
        rows = write_tokens(model, catalogue, prompts, tokens_per_micro_batch=tokens_per_micro_batch)
        return read_items(rows, catalogue, names)

    return write


def read_items(rows: list[ndarray], catalogue: Catalogue, names: ItemNames) -> Written:
    """Return texts and items of rows of `write_tokens`; one that did not end is no item."""
    ended = np.array([row.size > 0 and row[-1] == catalogue.end for row in rows], dtype=bool)
    bare = [row[:-1] if whole else row for row, whole in zip(rows, ended, strict=True)]
    items = [names.item(row) if whole else NO_ITEM for row, whole in zip(bare, ended, strict=True)]
    return Written([names.text(row) for row in bare], ended, np.array(items, dtype=np.int64))


def _padded_left(
    prompts: list[ndarray], fill: int, device: torch.device
) -> tuple[Int[Tensor, "R T"], Int[Tensor, "R T"]]:
    """Return prompts with padding before them, and 1 where there is a token of theirs."""
    width = max(prompt.size for prompt in prompts)
    tokens, mask = (np.full((len(prompts), width), value, dtype=np.int64) for value in (fill, 0))
    for row, prompt in enumerate(prompts):
        tokens[row, width - prompt.size :] = prompt
        mask[row, width - prompt.size :] = 1
    return torch.from_numpy(tokens).to(device), torch.from_numpy(mask).to(device)


def _length(tokens: Int[ndarray, " t"], end: int) -> int:
    """Return how many tokens there are up to and with the first end token; all where there is none."""
    ends = np.flatnonzero(tokens == end)
    return int(ends[0]) + 1 if ends.size else tokens.size
