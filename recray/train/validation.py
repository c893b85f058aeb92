"""Ranking on validation rows while training, spread over ranks.

Axes:
    R  rows of this micro-batch
    C  candidates of a row
"""

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Int
from numpy import ndarray

from recray.data.catalogue import Catalogue
from recray.distributed.collectives import sum_over_ranks, world
from recray.lm.scorer import lay_out, segment_lengths, segments_of, sum_by_slot, to_device
from recray.ranking.metrics import hit_rate, ndcg, reciprocal_rank
from recray.ranking.rows import target_ranks
from recray.train.engine import Engine
from recray.train.feeding import company
from recray.train.units import split


class ValidationRows(NamedTuple):
    """Rows to rank: each target is among its candidates."""

    histories: list[Int[ndarray, " H"]]
    targets: Int[ndarray, " rows"]
    candidates: list[Int[ndarray, " C"]]


def validate(engine: Engine, catalogue: Catalogue, rows: ValidationRows, *, token_budget: int) -> dict[str, float]:
    """Return HR@1, HR@10, NDCG@10 and MRR over all rows, the same on every rank."""
    rank, size = world()
    lengths = segment_lengths(catalogue, rows.histories, rows.candidates)
    totals = torch.zeros(5, dtype=torch.float64)
    engine.module.eval()
    for places in split(lengths, size, token_budget)[rank]:
        found = _ranks_of(engine, catalogue, rows, places)
        if found.size:
            parts = (hit_rate(found, 1), hit_rate(found, 10), ndcg(found, 10), reciprocal_rank(found))
            totals += torch.tensor([*(part.sum() for part in parts), found.size], dtype=torch.float64)
    engine.module.train()
    *sums, count = sum_over_ranks(totals.to(engine.device)).tolist()
    return dict(zip(("hr@1", "hr@10", "ndcg@10", "mrr"), (total / count for total in sums), strict=True))


def _ranks_of(
    engine: Engine, catalogue: Catalogue, rows: ValidationRows, places: Int[ndarray, " R"]
) -> Int[ndarray, " R"]:
    """Return the rank of each target; a pass without rows keeps other ranks company."""
    chosen = [rows.candidates[place] for place in places]
    if places.size:
        layout = lay_out(catalogue, segments_of(catalogue, [rows.histories[p] for p in places], chosen))
    else:
        layout = company(catalogue)
    packed = to_device(layout, engine.device)
    with torch.no_grad():
        flat = sum_by_slot(engine.module(packed), packed).float().cpu().numpy()
    if not places.size:
        return np.zeros(0, dtype=np.int64)
    return target_ranks(np.split(flat, np.cumsum([items.size for items in chosen])[:-1]), chosen, rows.targets[places])
