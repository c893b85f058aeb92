"""Does sharing a prompt among candidates give this very model the scores it gives them apart?"""

import logging

import numpy as np
import torch
from numpy import ndarray

from recray.data.catalogue import Catalogue
from recray.errors import ModelError
from recray.lm.attention import why_not_shared
from recray.lm.scorer import ItemScorer, score_rows

logger = logging.getLogger(__name__)

TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.5}  # nats, over a whole item


def choose_sharing(
    scorer: ItemScorer, catalogue: Catalogue, histories: list[ndarray], candidates: list[ndarray]
) -> float:
    """Settle whether this model's candidates share a prompt, and say it in `catalogue.shares_prompt`.

    They do where scores of a few rows are then the model's own; else each candidate gets its own copy of the prompt,
    with a warning that says why.

    Returns:
        The largest difference, in nats, between our scores of these rows and the model's own.

    Raises:
        ModelError: if even separate scores are not the model's own: trained or ranked with them, the model would be
            silently wrong.
    """
    reason = why_not_shared(scorer.model)
    if reason is None:
        catalogue.shares_prompt = True
        try:
            worst = largest_difference(scorer, catalogue, histories, candidates)
        except (RuntimeError, ValueError, TypeError, AttributeError) as error:
            # What a model does with masks that it was not written for is anybody's guess.
            reason = f"with our masks it fails ({type(error).__name__}: {error})"
        else:
            if worst <= _allowed(scorer):
                return worst
            reason = f"scores would differ by {worst:.3g} nats from those of candidates apart"
    logger.warning(
        "%s can't share a prompt among candidates: %s; each is scored behind its own copy, at many times the cost",
        type(scorer.model).__name__,
        reason,
    )
    catalogue.shares_prompt = False
    worst = largest_difference(scorer, catalogue, histories, candidates)
    if not worst <= _allowed(scorer):
        raise ModelError(
            f"{type(scorer.model).__name__}: item scores differ by {worst:.3g} nats from the model's own (allowed: "
            f"{_allowed(scorer)}), so its head is more than a matrix and a soft cap; use another model"
        )
    return worst


def largest_difference(
    scorer: ItemScorer, catalogue: Catalogue, histories: list[ndarray], candidates: list[ndarray]
) -> float:
    """Return the largest difference, in nats, between our scores of these rows and the model's own, one by one.

    The model's own are those of an unpadded sequence without any mask or positions from us, so a sliding window, a
    recurrent layer or positions that the model counts for itself show up as a difference.
    """
    was_training = scorer.training
    scorer.eval()
    ours = score_rows(scorer, catalogue, histories, candidates, tokens_per_micro_batch=2**30)
    worst = 0.0
    for history, items, together in zip(histories, candidates, ours, strict=True):
        prompt = catalogue.prompt(history, np.sort(items))
        apart = [_own_score(scorer, prompt, catalogue.item(int(item))) for item in items]
        worst = max(worst, float(np.abs(together - np.array(apart)).max()))
    scorer.train(was_training)
    return worst


def _allowed(scorer: ItemScorer) -> float:
    return TOLERANCE.get(next(scorer.parameters()).dtype, 0.5)


@torch.inference_mode()
def _own_score(scorer: ItemScorer, prompt: ndarray, item: ndarray) -> float:
    device = next(scorer.parameters()).device
    tokens = torch.from_numpy(np.concatenate([prompt, item]).astype(np.int64))[None].to(device)
    logits = scorer.model(input_ids=tokens, use_cache=False).logits[0, len(prompt) - 1 : -1].float()
    return float(logits.log_softmax(dim=1).gather(1, tokens[0, len(prompt) :, None]).sum())
