"""How a history becomes text: prompts as versioned data, written in pieces.

A prompt is `opening`, one line an item of the history, then, where the template shows candidates, `between`
and one line a candidate, then `cue`; the item follows. Whatever separates an item from the cue belongs to the
item, and a line starts with a character that no tokenizer glues to the line feed before it. So each piece can
be encoded once for the whole catalogue and a prompt is a concatenation (`recray.data.catalogue`, which also
checks it).
"""

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from recray.data.tokenizer import special_tokens
from recray.errors import CatalogueError, ConfigError

_HISTORY = "\u2402history\u2403"  # stands for the lines while a chat template lays its marks around them
_CANDIDATES = "\u2402candidates\u2403"
# Chat templates that print today's date print this one, or tomorrow's prompt would be another.
_SOME_DAY = "{% macro strftime_now(pattern) %}01 Jan 2025{% endmacro %}\n"


@dataclass(frozen=True)
class Template:
    """One way to write a history; raise `version` with any change to the text it gives."""

    name: str
    version: int
    streams: bool = False  # a plain stream of titles: every item of the history is a target in one pass
    opening: str = ""
    between: str | None = None  # None: candidates are not shown
    cue: str = ""
    chat: bool = False  # laid out by the tokenizer's own chat template

    @property
    def shows_candidates(self) -> bool:
        """Whether the prompt lists the candidates."""
        return self.between is not None


_OPENING = "These are the items that a user chose, from the earliest to the latest:\n"
_BETWEEN = "Choose the next item from these candidates:\n"
_CUE = "The user's next item:"
_CHAT_CUE = "Which item will the user choose next? Answer with its title only."

TEMPLATES = {
    template.name: template
    for template in (
        Template("titles", 1, streams=True),
        Template("instruction", 1, opening=_OPENING, cue=_CUE),
        Template("instruction_candidates", 1, opening=_OPENING, between=_BETWEEN, cue=_CUE),
        Template("chat", 1, opening=_OPENING, cue=_CHAT_CUE, chat=True),
        Template("chat_candidates", 1, opening=_OPENING, between=_BETWEEN, cue=_CHAT_CUE, chat=True),
    )
}


def find_template(name: str) -> Template:
    """Return the template of this name, or raise `ConfigError` naming the nearest."""
    if name not in TEMPLATES:
        near = difflib.get_close_matches(name, TEMPLATES, n=1, cutoff=0.0)[0]
        raise ConfigError(f"no prompt template {name!r}; the nearest is {near!r}, there are: {', '.join(TEMPLATES)}")
    return TEMPLATES[name]


@dataclass(frozen=True)
class Frame:
    """A template's text for one tokenizer: its special tokens written out, chat marks around it."""

    opening: str
    line: tuple[str, str]  # before and after the label of an item in a list
    between: str | None
    cue: str
    item_before: str
    end: str  # the end token
    line_ends: bool  # an item of the history is followed by the end token too
    streams: bool

    def label(self, label: str) -> str:
        """Return a label as it is written: verbatim in a stream, on one line in a list."""
        return label if self.streams else " ".join(label.split())

    def line_text(self, label: str) -> str:
        """Return the text of an item in a list, without any end token."""
        return f"{self.line[0]}{self.label(label)}{self.line[1]}"

    def item_text(self, label: str) -> str:
        """Return the text of an item that follows the prompt, without the end token."""
        return f"{self.item_before}{self.label(label)}"

    def prompt_text(self, history: Sequence[str], candidates: Sequence[str] | None = None) -> str:
        """Return the whole prompt, special tokens written out; `candidates` only where they are shown."""
        end = self.end if self.line_ends else ""
        parts = [self.opening, *(self.line_text(label) + end for label in history)]
        if self.between is not None:
            parts += [self.between, *(self.line_text(label) for label in candidates or ())]
        return "".join([*parts, self.cue])


def frame(template: Template, tokenizer: PreTrainedTokenizerBase) -> Frame:
    """Return what `template` writes for `tokenizer`.

    Raises:
        CatalogueError: if the tokenizer has no end token, or none of the chat template that `template` needs.
    """
    end = tokenizer.eos_token
    if end is None:
        raise CatalogueError(
            "the tokenizer has no end-of-sequence token, so no item can end; set its eos_token, save it again"
        )
    if template.streams:
        # A model without a bos token (GPT-2, Qwen) has seen its end token before every text instead.
        return Frame(tokenizer.bos_token or end, ("", ""), None, "", "", end, line_ends=True, streams=True)
    opening, between, cue = template.opening, template.between, template.cue
    if template.chat:
        opening, between, cue = _chat(template, tokenizer)
    else:
        opening = (tokenizer.bos_token or "") + opening
    glued = cue[-1].isspace() or cue.endswith(special_tokens(tokenizer))
    before = "" if glued else " "
    return Frame(opening, ("- ", "\n"), between, cue, before, end, line_ends=False, streams=False)


def training_texts(template: Template, labels: Sequence[str]) -> Iterator[str]:
    """Yield every text that a tokenizer trained for this template should know well, with one line an item."""
    if template.streams:
        yield from labels
        return
    yield from (template.opening, template.between or "", template.cue)
    for label in labels:
        yield f"- {' '.join(label.split())}\n"


def _chat(template: Template, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str | None, str]:
    """Return opening, between and cue with the marks of the tokenizer's chat template around them."""
    instead = f"use {template.name.replace('chat', 'instruction')!r}"
    if not tokenizer.chat_template:
        raise CatalogueError(
            f"prompt template {template.name!r} needs a tokenizer with a chat template, and this one has "
            f"none; {instead}, or an instruction-tuned model"
        )
    marks = [_HISTORY] if template.between is None else [_HISTORY, _CANDIDATES]
    content = f"{template.opening}{_HISTORY}{template.between or ''}{''.join(marks[1:])}{template.cue}"
    try:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": content}],
            chat_template=_SOME_DAY + tokenizer.get_chat_template(),
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=False,  # the item comes at once: templates that know no thinking ignore this
        )
    except (TemplateError, ValueError) as error:  # ValueError: several templates, none the default
        raise CatalogueError(
            f"the tokenizer's chat template can't write a user's message ({error}); {instead}"
        ) from None
    if any(text.count(mark) != 1 for mark in marks):
        raise CatalogueError(
            f"the tokenizer's chat template does not write the user's message once and as it is; got {text!r}; "
            f"{instead}"
        )
    opening, rest = text.split(_HISTORY)
    if template.between is None:
        return opening, None, rest
    between, cue = rest.split(_CANDIDATES)
    return opening, between, cue
