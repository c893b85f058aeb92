"""Prompts as text: what each template writes, and what a chat template must do to it."""

from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from recray.data.prompts import TEMPLATES, Frame, Template, find_template, frame, training_texts
from recray.data.tokenizer import train_tokenizer
from recray.errors import CatalogueError, ConfigError

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] | trim }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
MARKS = ["<|im_start|>", "<|im_end|>"]


def tokenizer_for_tests(chat_template: Any = None) -> PreTrainedTokenizerFast:
    tokenizer = train_tokenizer(["Toy Story (1995)"], 300)
    tokenizer.add_special_tokens({"extra_special_tokens": MARKS})
    tokenizer.chat_template = chat_template
    return tokenizer


def chat_frame(chat_template: Any, name: str = "chat") -> Frame:
    return frame(find_template(name), tokenizer_for_tests(chat_template))


def test_titles_are_a_plain_stream() -> None:
    titles = frame(find_template("titles"), tokenizer_for_tests())
    assert titles.prompt_text(["Toy Story (1995)", " B"]) == "<bos>Toy Story (1995)<end> B<end>"
    assert titles.item_text("  x\n") == "  x\n"  # verbatim: nothing in a stream depends on lines
    assert [name for name, template in TEMPLATES.items() if template.streams] == ["titles"]


def test_a_stream_without_a_bos_token_starts_with_the_end_token() -> None:
    tokenizer = tokenizer_for_tests()
    tokenizer.bos_token = None
    assert frame(find_template("titles"), tokenizer).prompt_text(["A"]) == "<end>A<end>"


def test_the_instruction_lists_the_history_and_leaves_the_space_to_the_item() -> None:
    instruction = frame(find_template("instruction"), tokenizer_for_tests())
    assert instruction.prompt_text(["A", "B\n  C "], ["unused"]) == (
        "<bos>These are the items that a user chose, from the earliest to the latest:\n"
        "- A\n- B C\nThe user's next item:"
    )
    assert instruction.item_text("B\n  C ") == " B C"


def test_candidates_are_listed_where_the_template_shows_them() -> None:
    shown = frame(find_template("instruction_candidates"), tokenizer_for_tests())
    assert shown.prompt_text(["A"], ["B", "C"]).endswith(
        "latest:\n- A\nChoose the next item from these candidates:\n- B\n- C\nThe user's next item:"
    )
    assert {name for name, template in TEMPLATES.items() if template.shows_candidates} == {
        "instruction_candidates",
        "chat_candidates",
    }


def test_a_chat_prompt_is_what_the_chat_template_makes_of_the_instruction() -> None:
    tokenizer = tokenizer_for_tests(CHATML)
    template = find_template("chat_candidates")
    content = f"{template.opening}- A\n- B\n{template.between}- C\n{template.cue}"
    whole = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True, enable_thinking=False
    )
    chat = frame(template, tokenizer)
    assert chat.prompt_text(["A", "B"], ["C"]) == whole
    assert whole.endswith("<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert chat.item_text("A") == "A"  # the answer starts on its own line: no space


@pytest.mark.parametrize(("cue_end", "item"), [("[/INST]", " A"), ("<|im_start|>", "A"), ("model\n", "A")])
def test_an_item_is_set_off_by_a_space_unless_the_cue_does_so(cue_end: str, item: str) -> None:
    chat = chat_frame("{{ messages[0]['content'] }}{{ " + repr(cue_end) + " }}")
    assert chat.item_text("A") == item


def test_a_chat_template_that_prints_the_date_gives_the_same_prompt_every_day() -> None:
    dated = "{% if strftime_now is defined %}Today is {{ strftime_now('%d %b %Y') }}.\n{% endif %}"
    chat = chat_frame("  " + dated + "{{ messages[0]['content'] }}")
    assert chat.opening.startswith("Today is 01 Jan 2025.")


def test_chat_without_a_chat_template_is_refused() -> None:
    with pytest.raises(CatalogueError, match=r"'chat_candidates' needs .* use 'instruction_candidates'"):
        frame(find_template("chat_candidates"), tokenizer_for_tests())


@pytest.mark.parametrize("chat_template", ["{{ messages[0]['content'] * 2 }}", "hello"])
def test_a_chat_template_that_does_not_write_the_message_once_is_refused(chat_template: str) -> None:
    with pytest.raises(CatalogueError, match="does not write the user's message once"):
        chat_frame(chat_template)


@pytest.mark.parametrize("chat_template", ["{{ raise_exception('no users') }}", "{% if %}", {"tools": "x"}])
def test_a_chat_template_that_fails_is_refused(chat_template: Any) -> None:
    with pytest.raises(CatalogueError, match=r"chat template can't write a user's message .* use 'instruction'"):
        chat_frame(chat_template)


def test_a_tokenizer_without_an_end_token_is_refused() -> None:
    tokenizer = tokenizer_for_tests()
    tokenizer.eos_token = None
    with pytest.raises(CatalogueError, match="no end-of-sequence token"):
        frame(find_template("titles"), tokenizer)


def test_an_unknown_template_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="no prompt template 'title'; the nearest is 'titles', there are: titles, "):
        find_template("title")


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=lambda template: template.name)
def test_training_texts_hold_every_label_and_word_of_the_prompt(template: Template) -> None:
    texts = "\n".join(training_texts(template, ["Toy Story (1995)", "B"]))
    for part in ("Toy Story (1995)", "B", template.opening, template.between or "", template.cue):
        assert part in texts


def test_the_configuration_knows_every_template() -> None:
    from typing import get_args

    from recray.config import Prompt

    assert set(get_args(Prompt.model_fields["template"].annotation)) == set(TEMPLATES)
