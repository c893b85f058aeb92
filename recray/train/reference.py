"""Reference scores made while training, of the very tokens that the policy scores.

The third source, a table made beforehand (`recray.stages.reference`), needs no pass and comes with the unit.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from recray.lm.lora import adapter_off
from recray.lm.scorer import ItemScorer, Packed, sum_by_slot
from recray.train.engine import Engine

ReferencePass = Callable[[Engine, list[Packed]], list[Float[Tensor, " _"]]]


def scores_without_adapter(engine: Engine, packs: list[Packed]) -> list[Float[Tensor, " _"]]:
    """Return the scores of each micro-batch by the engine's model with its adapter switched off, without gradient.

    Dropout is off as well, whatever mode the model is in, and the mode is left as it was. A collective under ZeRO-3.
    """
    module, was_training = engine.module, engine.module.training
    module.eval()
    try:
        with torch.no_grad(), adapter_off(module):
            return [sum_by_slot(module(packed), packed) for packed in packs]
    finally:
        module.train(was_training)


def scores_of_copy(copy: ItemScorer) -> ReferencePass:
    """Return the pass through a second model, which is frozen here and stays whole on every rank."""
    copy.eval().requires_grad_(False)

    def scores(engine: Engine, packs: list[Packed]) -> list[Float[Tensor, " _"]]:
        copy.to(engine.device)
        with torch.no_grad():
            return [sum_by_slot(copy(packed), packed) for packed in packs]

    return scores
