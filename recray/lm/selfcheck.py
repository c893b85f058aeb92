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
    """Return the largest difference, in nats, between shared scores of a few rows and the model's own, one by one.

    The model's own are those of an unpadded sequence without any mask or positions from us, so a sliding window, a
    recurrent layer or positions that the model counts for itself show up as a difference.

    Raises:
        ModelError: if it is too large: trained or ranked with such scores, the model would be silently wrong.
    """
    was_training = scorer.training
    scorer.eval()
    shared = score_rows(scorer, catalogue, histories, candidates, tokens_per_micro_batch=2**30)
    worst = 0.0
    for history, items, together in zip(histories, candidates, shared, strict=True):
        prompt = catalogue.prompt(history, np.sort(items))
        apart = [_own_score(scorer, prompt, catalogue.item(int(item))) for item in items]
        worst = max(worst, float(np.abs(together - np.array(apart)).max()))
    scorer.train(was_training)
    allowed = TOLERANCE.get(next(scorer.parameters()).dtype, 0.5)
    if not worst <= allowed:
        raise ModelError(
            f"{type(scorer.model).__name__} can't share a prompt among candidates: scores differ by {worst:.3g} nats "
            f"from scoring each apart (allowed: {allowed}); use one with full attention and rotary or learned positions"
        )
    return worst


@torch.inference_mode()
def _own_score(scorer: ItemScorer, prompt: ndarray, item: ndarray) -> float:
    device = next(scorer.parameters()).device
    tokens = torch.from_numpy(np.concatenate([prompt, item]).astype(np.int64))[None].to(device)
    logits = scorer.model(input_ids=tokens, use_cache=False).logits[0, len(prompt) - 1 : -1].float()
    return float(logits.log_softmax(dim=1).gather(1, tokens[0, len(prompt) :, None]).sum())
