"""Forms of a language model's score: what each ranks first, and the choice among them."""

import numpy as np
import pytest

from recray.ranking.forms import SUMMED, Form, best_form, forms_of
from recray.ranking.rows import target_ranks

# A long title that the history speaks for, a short one, and one that everybody likes.
SUMMED_SCORES = np.array([-8.0, -6.0, -3.0], dtype=np.float32)
TOKENS = np.array([8, 2, 2])
PRIOR = np.array([-14.0, -7.0, -1.0], dtype=np.float32)


@pytest.mark.parametrize(
    ("form", "expected", "first"),
    [
        (SUMMED, [-8.0, -6.0, -3.0], 2),
        (Form("mean"), [-1.0, -3.0, -1.5], 0),
        (Form("prior_corrected", 0.5), [-1.0, -2.5, -2.5], 0),
        (Form("prior_corrected", 1.0), [6.0, 1.0, -2.0], 0),
    ],
)
def test_a_form_is_its_definition(form: Form, expected: list[float], first: int) -> None:
    found = form(SUMMED_SCORES, TOKENS, PRIOR if form.needs_prior else None)
    np.testing.assert_allclose(found, expected)
    assert int(found.argmax()) == first


def test_the_setting_leaves_these_forms_to_choose_from() -> None:
    weights = (0.25, 1.0)
    names = ["summed", "mean", "prior_corrected 0.25", "prior_corrected 1"]
    assert [str(form) for form in forms_of("validation", weights)] == names
    assert [str(form) for form in forms_of("prior_corrected", weights)] == names[2:]
    assert forms_of("summed", weights) == [SUMMED]


def test_the_best_on_validation_is_taken_and_of_equals_the_plainest() -> None:
    forms = forms_of("validation", (1.0,))
    rank = np.array([[3, 1, 1], [1, 2, 2]])
    best, found = best_form(forms, rank, 10)
    assert best == Form("mean")
    assert found == pytest.approx({"summed": 0.75, "mean": (1 + 1 / np.log2(3)) / 2, "prior_corrected 1": 0.8154648767})
    assert best_form(forms, np.full((4, 3), 2), 10)[0] == SUMMED
    # Beyond k a better rank counts for nothing.
    assert best_form(forms, np.array([[20, 15, 11]]), 10)[0] == SUMMED


def test_ranks_of_targets_are_by_item_with_ties_against_them() -> None:
    scores = [np.array([0.5, 2.0, 0.5]), np.array([1.0])]
    candidates = [np.array([7, 3, 9]), np.array([4])]
    assert target_ranks(scores, candidates, np.array([9, 4])).tolist() == [3, 1]
    with pytest.raises(ValueError, match="row 1: its candidates do not hold its target, 5"):
        target_ranks(scores, candidates, np.array([9, 5]))
