"""Ranking on validation rows while training, spread over ranks.

Axes:
    R  rows of this micro-batch
    C  candidates of a row
    I  items of the catalogue
"""

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy import ndarray

from recray.data.catalogue import Catalogue
from recray.distributed.collectives import sum_over_ranks, world
from recray.lm.scorer import lay_out, segment_lengths, segments_of, sum_by_slot, to_device
from recray.ranking.exposure import average_popularity
from recray.ranking.metrics import hit_rate, ndcg, reciprocal_rank
from recray.ranking.rows import best_candidates, target_ranks
from recray.train.engine import Engine
from recray.train.feeding import company
from recray.train.units import split

SHOWN = 10  # items that popularity is told of


class ValidationRows(NamedTuple):
    """Rows to rank: each target is among its candidates."""

    histories: list[Int[ndarray, " H"]]
    targets: Int[ndarray, " rows"]
    candidates: list[Int[ndarray, " C"]]


def validate(
    engine: Engine,
    catalogue: Catalogue,
    rows: ValidationRows,
    *,
    token_budget: int,
    popularity: Int[ndarray, " I"] | None = None,
) -> dict[str, float]:
    """Return HR@1, HR@10, NDCG@10 and MRR over all rows, the same on every rank.

    Args:
        engine: With the model.
        catalogue: Of the items.
        rows: To rank.
        token_budget: Most tokens of a micro-batch.
        popularity: Training interactions of every item; with it also popularity@10, the mean over rows of that of the
            ten items ranked first.
    """
    rank, size = world()
    lengths = segment_lengths(catalogue, rows.histories, rows.candidates)
    names = ["hr@1", "hr@10", "ndcg@10", "mrr"] + ([] if popularity is None else [f"popularity@{SHOWN}"])
    totals = torch.zeros(len(names) + 1, dtype=torch.float64)
    engine.module.eval()
    for places in split(lengths, size, token_budget)[rank]:
        scores = _scores_of(engine, catalogue, rows, places)
        if places.size:
            chosen, targets = [rows.candidates[place] for place in places], rows.targets[places]
            found = target_ranks(scores, chosen, targets)
            parts = [hit_rate(found, 1), hit_rate(found, 10), ndcg(found, 10), reciprocal_rank(found)]
            if popularity is not None:
                parts.append(average_popularity(best_candidates(scores, chosen, targets, SHOWN), popularity, SHOWN))
            totals += torch.tensor([*(part.sum() for part in parts), places.size], dtype=torch.float64)
    engine.module.train()
    *sums, count = sum_over_ranks(totals.to(engine.device)).tolist()
    return dict(zip(names, (total / count for total in sums), strict=True))


def _scores_of(
    engine: Engine, catalogue: Catalogue, rows: ValidationRows, places: Int[ndarray, " R"]
) -> list[Float[ndarray, " C"]]:
    """Return the scores of each row's candidates; a pass without rows keeps other ranks company."""
    chosen = [rows.candidates[place] for place in places]
    if places.size:
        layout = lay_out(catalogue, segments_of(catalogue, [rows.histories[p] for p in places], chosen))
    else:
        layout = company(catalogue)
    packed = to_device(layout, engine.device)
    with torch.no_grad():
        flat = sum_by_slot(engine.module(packed), packed).float().cpu().numpy()
    return np.split(flat, np.cumsum([items.size for items in chosen])[:-1]) if places.size else []
