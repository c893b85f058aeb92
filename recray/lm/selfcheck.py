"""Does sharing a prompt among candidates give this very model the scores it gives them apart?"""

import numpy as np
import torch
from numpy import ndarray

from recray.data.catalogue import Catalogue
from recray.errors import ModelError
from recray.lm.scorer import ItemScorer, score_rows

TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.5}  # nats, over a whole item


def check_sharing(
    scorer: ItemScorer, catalogue: Catalogue, histories: list[ndarray], candidates: list[ndarray]
) -> float:
    """Return the largest difference, in nats, between shared and separate scores of a few rows.

    Raises:
        ModelError: if it is too large: the model reads more of a row than mask and positions tell it to (recurrent
            layers, sliding windows, positions of its own), and its scores would be silently wrong.
    """
    was_training = scorer.training
    scorer.eval()
    shared = score_rows(scorer, catalogue, histories, candidates, tokens_per_micro_batch=2**30)
    worst = 0.0
    for history, items, together in zip(histories, candidates, shared, strict=True):
        # One candidate at a time, but the same list shown in the prompt.
        apart = [
            score_rows(scorer, catalogue, [history], [items[k : k + 1]], shown=[items], tokens_per_micro_batch=2**30)
            for k in range(items.size)
        ]
        worst = max(worst, float(np.abs(together - np.concatenate([row[0] for row in apart])).max()))
    scorer.train(was_training)
    allowed = TOLERANCE.get(next(scorer.parameters()).dtype, 0.5)
    if worst > allowed:
        raise ModelError(
            f"{type(scorer.model).__name__} can't share a prompt among candidates: scores differ by {worst:.3g} nats "
            f"from scoring each apart (allowed: {allowed}); use one with full attention and rotary or learned positions"
        )
    return worst
