"""Tokenizers: one trained on the catalogue for models made from scratch; encoding that keeps pieces apart."""

from collections.abc import Iterable, Sequence

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from recray.errors import CatalogueError

PAD, BOS, END = "<pad>", "<bos>", "<end>"
SMALLEST_VOCABULARY = 256 + 3  # every byte, so that no title is unknown, and the special tokens


def train_tokenizer(texts: Iterable[str], vocabulary: int, *, across_words: bool = False) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer of at most `vocabulary` tokens, trained on `texts`.

    The same texts give the same tokenizer, in whatever order they come. Any text can be written and read
    back. Few texts support few merges: the vocabulary may be smaller than asked for.

    Args:
        across_words: Merge over spaces and marks too, so that a text that comes often may be one token.

    Raises:
        CatalogueError: if `vocabulary` has no room for the bytes and the special tokens.
    """
    if vocabulary < SMALLEST_VOCABULARY:
        raise CatalogueError(
            f"a vocabulary of {vocabulary} tokens is too small: 256 bytes and 3 special tokens need "
            f"{SMALLEST_VOCABULARY}; raise sft.model.vocabulary"
        )
    bpe = Tokenizer(models.BPE())
    # No space is put before a text: encode(a) + encode(b) could not be encode(a + b).
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not across_words)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[PAD, BOS, END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=END,
        clean_up_tokenization_spaces=False,
    )


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
