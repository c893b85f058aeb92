"""Prefix-shared scores and gradients against scoring every (prompt, item) pair alone through transformers."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from recray.data.catalogue import Catalogue
from recray.data.prompts import find_template
from recray.errors import DataError
from recray.lm import scorer as scorer_module
from recray.lm.layout import candidate_layout, stream_layout
from recray.lm.load import save_model
from recray.lm.scorer import ItemScorer, LoadedScorer, groups_by_tokens, score_rows, segments_of, sum_by_slot, to_device

Rows = tuple[list[np.ndarray], list[np.ndarray]]


def alone(model: PreTrainedModel, catalogue: Catalogue, history: np.ndarray, item: int) -> Tensor:
    """log pi(item | prompt) from full logits of one unpadded sequence."""
    prompt, own = catalogue.prompt(history), catalogue.item(item)
    tokens = torch.from_numpy(np.concatenate([prompt, own]).astype(np.int64))[None]
    log_probability = model(input_ids=tokens).logits[0].float().log_softmax(dim=1)
    places = torch.arange(len(prompt) - 1, tokens.shape[1] - 1)
    return log_probability[places, tokens[0, len(prompt) :]].double().sum()


def shared(scorer: ItemScorer, catalogue: Catalogue, rows: Rows) -> Tensor:
    packed = to_device(candidate_layout(segments_of(catalogue, *rows)), "cpu")
    return sum_by_slot(scorer(packed), packed)


def global_norm(gradients: list[Tensor]) -> Tensor:
    return torch.cat([gradient.flatten() for gradient in gradients]).norm()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_shared_scores_and_gradients_are_those_of_separate_rows(
    model: PreTrainedModel, catalogue: Catalogue, rows: Rows, attention: str
) -> None:
    model.set_attn_implementation(attention)
    separate = torch.stack([alone(model, catalogue, h, int(i)) for h, items in zip(*rows, strict=True) for i in items])
    together = shared(ItemScorer(model), catalogue, rows)
    torch.testing.assert_close(together, separate, atol=1e-5, rtol=0)

    weight = torch.linspace(-1, 1, len(together))
    parameters = list(model.parameters())
    ours = torch.autograd.grad((together * weight).sum(), parameters)
    theirs = torch.autograd.grad((separate * weight).sum(), parameters)
    difference = global_norm([a - b for a, b in zip(ours, theirs, strict=True)])
    assert difference <= 1e-5 * global_norm(list(theirs))


def test_chunks_of_the_head_change_neither_scores_nor_gradients(
    model: PreTrainedModel, catalogue: Catalogue, rows: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    scorer = ItemScorer(model)
    parameters = list(model.parameters())
    whole = shared(scorer, catalogue, rows)
    gradients = torch.autograd.grad(whole.square().sum(), parameters)
    monkeypatch.setattr(scorer_module, "LOGITS_KEPT", 0)
    monkeypatch.setattr(scorer_module, "LOGITS_AT_ONCE", 3 * len(model.get_input_embeddings().weight))
    chunked = shared(scorer, catalogue, rows)
    again = torch.autograd.grad(chunked.square().sum(), parameters)
    torch.testing.assert_close(chunked, whole, atol=1e-5, rtol=0)
    assert global_norm([a - b for a, b in zip(again, gradients, strict=True)]) <= 1e-5 * global_norm(list(gradients))


def test_a_stream_is_scored_like_its_items_one_after_the_other(model: PreTrainedModel, catalogue: Catalogue) -> None:
    history = np.array([4, 0, 7])
    stream = catalogue.prompt(history)
    packed = to_device(stream_layout(stream.astype(np.int64), np.array([len(stream)])), "cpu")
    total = sum_by_slot(ItemScorer(model)(packed), packed)
    items = sum(alone(model, catalogue, history[:k], int(history[k])) for k in range(3))
    torch.testing.assert_close(total[0], items, atol=1e-5, rtol=0)


def test_rows_come_back_in_their_order_whatever_the_budget(
    model: PreTrainedModel, catalogue: Catalogue, rows: Rows
) -> None:
    scorer = ItemScorer(model).eval()
    one_by_one = score_rows(scorer, catalogue, *rows, tokens_per_micro_batch=1)
    at_once = score_rows(scorer, catalogue, *rows, tokens_per_micro_batch=10**6)
    assert [len(row) for row in at_once] == [4, 1, 6, 2]
    for a, b in zip(one_by_one, at_once, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_groups_keep_to_their_budget_and_hold_every_row_once() -> None:
    lengths = np.array([5, 9, 2, 2, 7, 30])
    groups = groups_by_tokens(lengths, 18)
    assert sorted(row for group in groups for row in group) == list(range(6))
    assert all(len(group) == 1 or max(lengths[group]) * len(group) <= 18 for group in groups)


def test_a_saved_folder_scores_as_the_model_in_memory(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, catalogue: Catalogue, rows: Rows, tmp_path: Path
) -> None:
    save_model(tmp_path, model, tokenizer, catalogue)
    loaded = LoadedScorer(tmp_path, tokens_per_micro_batch=4096)(*rows)
    expected = score_rows(ItemScorer(model).eval(), catalogue, *rows, tokens_per_micro_batch=4096)
    for a, b in zip(loaded, expected, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("template", ["titles", "instruction", "instruction_candidates"])
def test_the_prior_is_the_score_behind_an_empty_history(
    template: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    catalogue: Catalogue,
    rows: Rows,
    tmp_path: Path,
) -> None:
    catalogue = Catalogue.build(catalogue.labels, tokenizer, find_template(template), 400)
    save_model(tmp_path, model, tokenizer, catalogue)
    loaded = LoadedScorer(tmp_path, tokens_per_micro_batch=4096)
    candidates = rows[1]
    nothing = [np.zeros(0, dtype=np.int64)] * len(candidates)
    expected = loaded(nothing, candidates)  # a template that shows candidates shows the row's own
    for _ in range(2):  # made, then kept
        for a, b in zip(loaded.prior(candidates), expected, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize(
    ("history", "items", "message"),
    [
        ([1, 12], [0], "row 1 of those to score has item 12 in its history"),
        ([1], [0, -1], "row 1 of those to score has item -1 in its candidates"),
        ([1], [], "row 1 of those to score has no candidates"),
    ],
)
def test_rows_that_can_not_be_scored_are_named(
    catalogue: Catalogue, history: list[int], items: list[int], message: str
) -> None:
    histories, candidates = [np.array([0]), np.array(history)], [np.array([2]), np.array(items, dtype=np.int64)]
    with pytest.raises(DataError, match=message):
        segments_of(catalogue, histories, candidates)
