"""Tokenizers: one trained on the catalogue for models made from scratch; encoding that keeps pieces apart."""

import json
from collections.abc import Iterable, Sequence

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from recray.errors import CatalogueError

PAD, BOS, END = "<pad>", "<bos>", "<end>"
SMALLEST_VOCABULARY = 256 + 3  # every byte, so that no title is unknown, and the special tokens
WHOLE_SHARE = 0.75  # of the other tokens, at most, are whole texts: what was not met is written in pieces of words


def train_tokenizer(texts: Iterable[str], vocabulary: int, *, whole: Sequence[str] = ()) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer of at most `vocabulary` tokens, trained on `texts`.

    The same texts give the same tokenizer, in whatever order they come. Any text can be written and read
    back. Few texts support few merges: the vocabulary may be smaller than asked for.

    Args:
        texts: From which pieces of words are merged.
        vocabulary: Tokens, bytes and special ones included.
        whole: Texts that are a token each where nothing but special tokens stands around them, the most important
            first: as many as fit in `WHOLE_SHARE` of what bytes and special tokens leave. Inside of other text they
            are read in pieces.

    Raises:
        CatalogueError: if `vocabulary` has no room for the bytes and the special tokens.
    """
    if vocabulary < SMALLEST_VOCABULARY:
        raise CatalogueError(
            f"a vocabulary of {vocabulary} tokens is too small: 256 bytes and 3 special tokens need "
            f"{SMALLEST_VOCABULARY}; raise sft.model.vocabulary"
        )
    own = [text for text in dict.fromkeys(whole) if text not in (PAD, BOS, END)]
    own = own[: int(WHOLE_SHARE * (vocabulary - SMALLEST_VOCABULARY))]
    bpe = Tokenizer(models.BPE())
    # No space is put before a text: encode(a) + encode(b) could not be encode(a + b).
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary - len(own),
        special_tokens=[PAD, BOS, END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    if own:
        bpe = _with_whole(bpe, own)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=END,
        clean_up_tokenization_spaces=False,
    )


def _with_whole(bpe: Tokenizer, texts: Sequence[str]) -> Tokenizer:
    """Return the tokenizer with a token for each of these texts, none of which is a special token.

    A text that is a token is not cut, so special tokens leave the model's own vocabulary for the end of all: a text
    that spells one would be it.
    """
    uncut = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    special = [token.content for token in bpe.get_added_tokens_decoder().values()]
    described = json.loads(bpe.to_str())
    model = described["model"]
    pieces = [token for token in sorted(model["vocab"], key=model["vocab"].get) if token not in special]
    written = ["".join(part for part, _ in uncut.pre_tokenize_str(text)) for text in texts]
    model["vocab"] = {token: place for place, token in enumerate(dict.fromkeys([*pieces, *written]))}
    model["ignore_merges"] = True
    described |= {"pre_tokenizer": described["pre_tokenizer"] | {"use_regex": False}, "added_tokens": []}
    found = Tokenizer.from_str(json.dumps(described))
    found.add_special_tokens(special)
    return found


def encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], *, special_text: bool) -> list[list[int]]:
    """Return the tokens of each text, none added.

    Args:
        special_text: True: the text of a special token stands for that token. False: it is text like any
            other, which is how titles are read, or a title could end itself.
    """
    if not texts:
        return []
    found = tokenizer(
        list(texts),
        add_special_tokens=False,
        split_special_tokens=not special_text,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )
    tokens: list[list[int]] = found["input_ids"]
    return tokens


def encode_after(tokenizer: PreTrainedTokenizerBase, anchor: str, texts: Sequence[str]) -> list[list[int]]:
    """Return the tokens that each text adds after `anchor`, in which special tokens are read as such.

    Encoding behind what really stands there gives sentence-piece tokenizers, which put a space before a text
    on its own, no occasion to do so.

    Raises:
        CatalogueError: naming the text and both tokenisations, if the tokens of `anchor` change with what
        follows.
    """
    special = holds_special(tokenizer, texts)
    after: list[list[int]] = [[] for _ in texts]
    for is_special in (False, True):
        chosen = [index for index, found in enumerate(special) if found == is_special]
        # A text that spells a special token is read as plain text; so must its anchor be then.
        head = _plain_tail(tokenizer, anchor) if is_special else anchor
        (alone,) = encode(tokenizer, [head], special_text=not is_special)
        together = encode(tokenizer, [head + texts[index] for index in chosen], special_text=not is_special)
        for index, tokens in zip(chosen, together, strict=True):
            if tokens[: len(alone)] != alone:
                raise boundary_error(tokenizer, f"the text {texts[index]!r} after {head!r}", alone, tokens)
            after[index] = tokens[len(alone) :]
    return after


def holds_special(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[bool]:
    """Return for each text whether it spells one of the tokenizer's special tokens."""
    special = special_tokens(tokenizer)
    return [any(token in text for token in special) for text in texts]


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """Return the text of every special token, those without a role (reserved, say) included."""
    added = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    return tuple(sorted(added | set(tokenizer.all_special_tokens)))


def boundary_error(
    tokenizer: PreTrainedTokenizerBase, what: str, apart: Sequence[int], together: Sequence[int]
) -> CatalogueError:
    """Return the error that a boundary moved, showing both tokenisations from shortly before they part."""
    same = next((i for i, (a, b) in enumerate(zip(apart, together, strict=False)) if a != b), len(apart))
    start = max(0, same - 3)
    shown = [tokenizer.convert_ids_to_tokens(list(ids[start : same + 8])) for ids in (apart, together)]
    return CatalogueError(
        f"{what}: encoded apart, the tokens go on {shown[0]}, but encoded together {shown[1]}; this "
        f"tokenizer merges across the boundary, so the scores would not be those of the text; use another "
        f"prompt template or tokenizer"
    )


def _plain_tail(tokenizer: PreTrainedTokenizerBase, anchor: str) -> str:
    """Return what follows the last special token in `anchor`."""
    ends = [anchor.rfind(token) + len(token) for token in special_tokens(tokenizer) if token in anchor]
    return anchor[max(ends, default=0) :]
