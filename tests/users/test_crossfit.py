"""Folds of users: who is left out, what that changes, and how well confidences tell false negatives."""

import numpy as np
import pyarrow as pa
import pytest

from recray.config import Users
from recray.errors import DataError
from recray.users.crossfit import Log, confidences, folds_of, separation, without
from recray.users.fit import Validation, fit
from recray.users.ragged import Ragged, from_lengths, take
from recray.users.sasrec import SASRec, Shape, item_vectors, user_vectors
from tests.users import walks

SEED, NUM_USERS = 1, 40
NAMES = pa.array([f"user {number}" for number in range(NUM_USERS)])

SHAPE = Shape(walks.NUM_ITEMS, dim=8, layers=1, heads=2, max_history=8, dropout=0.1)


def test_folds_are_halves_by_seed_and_id_alone() -> None:
    names = pa.array([f"user {number}" for number in range(4000)])
    folds = folds_of(names, seed=SEED)
    assert set(folds.tolist()) == {0, 1}
    assert folds.mean() == pytest.approx(0.5, abs=0.03)  # 4 standard errors
    some = np.random.default_rng(0).permutation(4000)[:100]
    assert (folds_of(names.take(pa.array(some)), seed=SEED) == folds[some]).all()
    others = folds_of(names, seed=SEED + 1)
    assert (others == folds).mean() == pytest.approx(0.5, abs=0.03)


def _log() -> Log:
    histories, validation = walks.histories_and_validation(NUM_USERS)
    folds = folds_of(NAMES, seed=SEED)
    return Log(histories, validation, folds, folds[::-1].copy())


def _lists(ragged: Ragged) -> list[list[int]]:
    return [each.tolist() for each in np.split(ragged.items, ragged.offsets[1:-1])]


def test_without_a_fold_none_of_its_users_is_left_and_all_others_are() -> None:
    log = _log()
    for fold in (0, 1):
        left = without(fold, log)
        others = [row for row in range(NUM_USERS) if log.folds[row] != fold]
        assert _lists(left.histories) == [_lists(log.histories)[row] for row in others]
        rows = [row for row in range(NUM_USERS) if log.rows_folds[row] != fold]
        assert left.validation.targets.tolist() == log.validation.targets[rows].tolist()
        for name in ("histories", "candidates"):
            kept, all_of_them = (_lists(getattr(one.validation, name)) for one in (left, log))
            assert kept == [all_of_them[row] for row in rows]
        assert set(left.folds.tolist()) == set(left.rows_folds.tolist()) == {1 - fold}


@pytest.mark.parametrize("which", ["folds", "rows_folds"])
def test_a_fold_that_holds_everybody_is_refused(which: str) -> None:
    alone = _log()._replace(**{which: np.ones(NUM_USERS, dtype=np.int32)})
    without(0, alone)
    with pytest.raises(DataError, match=r"without fold 1 .* set users.folds=1"):
        without(1, alone)


def _changed(log: Log, user: int) -> Log:
    """The log, with another history of one user, also where it is a validation row; as long as before."""
    lists = []
    for ragged in (log.histories, log.validation.histories):
        items = ragged.items.copy()
        own = slice(ragged.offsets[user], ragged.offsets[user + 1])
        items[own] = (items[own] + 11) % walks.NUM_ITEMS
        lists.append(from_lengths(items, ragged.lengths))
    old = log.validation
    return log._replace(histories=lists[0], validation=Validation(lists[1], old.candidates, old.targets))


def _sure(log: Log, history: Ragged) -> np.ndarray:
    """Confidences of a user after a history, by the model fitted on this log."""
    settings = Users(global_batch=16, learning_rate=1e-2, passes=3, dropout=0.1)
    model = SASRec(SHAPE, seed=0)
    fit(model, log.histories, log.validation, settings, seed=SEED, report=lambda _: None)
    return confidences(user_vectors(model, history), np.zeros(1, dtype=np.int32), [item_vectors(model)])[0]


def test_a_users_confidence_does_not_hang_on_its_own_history_when_it_is_left_out() -> None:
    log = _log()._replace(rows_folds=folds_of(NAMES, seed=SEED))
    user = int(np.flatnonzero((log.folds == 0) & (log.histories.lengths > 6))[0])
    stranger = int(np.flatnonzero((log.folds == 1) & (log.histories.lengths > 6))[0])
    history = take(log.histories, np.array([user]))  # what is asked about stays, what is learnt from changes
    before, own, others = (without(0, each) for each in (log, _changed(log, user), _changed(log, stranger)))
    unseen = _sure(before, history)
    np.testing.assert_array_equal(_sure(own, history), unseen)
    assert (_sure(others, history) != unseen).any()
    assert (_sure(_changed(log, user), history) != _sure(log, history)).any()


def test_a_confidence_is_of_the_judge_of_the_users_fold() -> None:
    rng = np.random.default_rng(0)
    users, judges = rng.normal(size=(5, 4)).astype(np.float32), list(rng.normal(size=(2, 7, 4)).astype(np.float32))
    folds = np.array([1, 0, 0, 1, 0])
    found = confidences(users, folds, judges)
    for row, fold in enumerate(folds):
        scores = judges[fold] @ users[row]
        for item in range(7):
            below = sum(score < scores[item] for score in scores) + 0.5  # itself a tie
            assert found[row, item] == pytest.approx(0.5 - below / 7, abs=1e-6)


def test_separation_is_the_share_of_pairs_in_the_right_order() -> None:
    rng = np.random.default_rng(0)
    sure = np.round(rng.normal(size=(6, 9)), 1)
    false, among = rng.random((6, 9)) < 0.3, rng.random((6, 9)) < 0.8
    right = [
        1.0 if other > wrong else 0.5 if other == wrong else 0.0
        for wrong in sure[false & among]
        for other in sure[~false & among]
    ]
    assert 0.5 in right
    assert separation(sure, false, among) == pytest.approx(np.mean(right))
    assert separation(-sure, false, among) == pytest.approx(1 - np.mean(right))
    every = np.ones_like(false)
    assert separation(np.where(false, -0.5, 0.5), false, every) == 1.0
    assert separation(np.zeros_like(sure), false, every) == 0.5
    assert np.isnan(separation(sure, ~every, every))
    assert np.isnan(separation(sure, every, every))
