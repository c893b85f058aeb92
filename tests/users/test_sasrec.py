"""SASRec's states: what they depend on and what they must not."""

from pathlib import Path

import numpy as np
import pytest
import torch

from recray.errors import ModelError
from recray.users.ragged import Ragged, from_lengths
from recray.users.sasrec import SASRec, Shape, item_vectors, load, save, user_vectors

SHAPE = Shape(num_items=20, dim=8, layers=2, heads=2, max_history=6, dropout=0.5)


def _model(shape: Shape = SHAPE) -> SASRec:
    model = SASRec(shape, seed=1).eval()
    with torch.no_grad():  # large weights, so that a difference shows
        for name, value in model.named_parameters():
            if "norm" not in name:
                value.mul_(20)
    return model


def _histories(*lists: list[int]) -> Ragged:
    return from_lengths(
        np.array([item for each in lists for item in each], dtype=np.int32),
        np.array([len(each) for each in lists], dtype=np.int64),
    )


def test_later_items_do_not_change_earlier_states() -> None:
    model = _model()
    one, other = torch.tensor([[3, 1, 4, 1, 5]]), torch.tensor([[3, 1, 4, 9, 2]])
    length = torch.tensor([5])
    a, b = model(one, length), model(other, length)
    torch.testing.assert_close(a[:, :4], b[:, :4])
    assert (a[:, 4:] - b[:, 4:]).abs().amax(dim=-1).min() > 1e-3


def test_padding_is_never_seen() -> None:
    model = _model()
    alone = model(torch.tensor([[3, 1]]), torch.tensor([2]))
    for filler in (0, 7):
        beside = model(torch.tensor([[3, 1, filler, filler], [5, 6, 7, 8]]), torch.tensor([2, 4]))
        torch.testing.assert_close(beside[:1, :3], alone)


def test_short_histories_of_different_lengths_have_states_of_their_own() -> None:
    # Elsewhere all histories shorter than the width came out as one and the same padded state.
    model = _model()
    together = user_vectors(model, _histories([], [3], [3, 1], [1, 3], [3, 1, 4], [1], [3, 1, 4, 1, 5, 9]))
    for place, history in enumerate([[], [3], [3, 1], [1, 3], [3, 1, 4], [1], [3, 1, 4, 1, 5, 9]]):
        alone = model(torch.tensor([history], dtype=torch.int64), torch.tensor([len(history)]))[0, len(history)]
        np.testing.assert_allclose(together[place], alone.detach().numpy(), atol=1e-5)
    distances = np.abs(together[:, None] - together[None]).max(axis=2)
    assert distances[~np.eye(len(together), dtype=bool)].min() > 1e-2


def test_the_latest_item_is_always_at_one_position() -> None:
    # With attention and hidden layers silent, a state is its own item and position alone.
    model = _model()
    with torch.no_grad():
        for block in model.blocks:
            for part in (block.attended, block.narrow):
                part.weight.zero_()
                part.bias.zero_()
    vectors = user_vectors(model, _histories([5], [1, 5], [2, 3, 4, 5]))
    np.testing.assert_allclose(vectors[1:], vectors[:1].repeat(2, axis=0), atol=1e-5)


def test_vectors_do_not_depend_on_the_batch() -> None:
    model = _model()
    histories = _histories([1, 2], [3], [], [4, 5, 6])
    np.testing.assert_allclose(
        user_vectors(model, histories, rows_at_once=1), user_vectors(model, histories), atol=1e-5
    )
    assert user_vectors(model, _histories()).shape == (0, 8)


def test_long_histories_keep_their_latest_items() -> None:
    model = _model()
    vectors = user_vectors(model, _histories([9, 9, 1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 6]))
    np.testing.assert_allclose(vectors[0], vectors[1], atol=1e-6)


def test_dropout_is_off_for_vectors_and_the_mode_comes_back() -> None:
    model = _model().train()
    histories = _histories([1, 2, 3])
    np.testing.assert_array_equal(user_vectors(model, histories), user_vectors(model, histories))
    assert model.training


def test_saved_is_loaded(tmp_path: Path) -> None:
    model = _model()
    save(model, tmp_path / "model")
    again = load(tmp_path / "model")
    assert again.shape == SHAPE
    histories = _histories([1, 2, 3], [4])
    np.testing.assert_array_equal(user_vectors(again, histories), user_vectors(model, histories))
    np.testing.assert_array_equal(item_vectors(again), item_vectors(model))
    with pytest.raises(ModelError, match="holds no SASRec"):
        load(tmp_path)
    (tmp_path / "model" / "model.safetensors").write_bytes(b"cut short")
    with pytest.raises(ModelError, match="holds no SASRec"):
        load(tmp_path / "model")


def test_weights_follow_from_the_seed_alone() -> None:
    torch.manual_seed(5)
    one = SASRec(SHAPE, seed=3)
    torch.manual_seed(6)
    two, other = SASRec(SHAPE, seed=3), SASRec(SHAPE, seed=4)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert not torch.equal(one.items.weight, other.items.weight)


def test_heads_must_divide_the_width() -> None:
    with pytest.raises(ValueError, match="multiple of users.heads"):
        SASRec(Shape(num_items=3, dim=8, layers=1, heads=3, max_history=2, dropout=0.0), seed=0)
