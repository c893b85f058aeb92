"""Ranking on validation rows, against the scores of the same model row by row."""

from pathlib import Path

import numpy as np
import pytest

from recray.lm.load import open_recommender
from recray.lm.scorer import ItemScorer, score_rows
from recray.train.engine import PlainEngine
from recray.train.validation import ValidationRows, validate

ITEMS = 30


def test_popularity_is_that_of_the_ten_first_and_metrics_stay(small_world: Path) -> None:
    rng = np.random.default_rng(3)
    model, catalogue = open_recommender(small_world / "model")
    scorer = ItemScorer(model).eval()
    chosen = [rng.permutation(ITEMS)[:size] for size in (14, 4, 12, 11)]  # one row has fewer than ten
    rows = ValidationRows(
        [rng.integers(ITEMS, size=3) for _ in chosen], np.array([own[2] for own in chosen]).astype(np.int64), chosen
    )
    counts = rng.integers(100, size=ITEMS)
    engine = PlainEngine(scorer, weight_decay=0.0, clip_norm=1.0)
    found = validate(engine, catalogue, rows, token_budget=200, popularity=counts)
    scores = score_rows(scorer, catalogue, rows.histories, chosen, tokens_per_micro_batch=9999)
    shown = [own[np.argsort(-np.array(each))[:10]] for own, each in zip(chosen, scores, strict=True)]
    assert found.pop("popularity@10") == pytest.approx(np.mean([counts[items].mean() for items in shown]))
    assert found == validate(engine, catalogue, rows, token_budget=10**6)
