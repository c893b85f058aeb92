"""One rank of a group that aligns an adapter under every engine; run by test_adapters.py, never collected.

python adapter_worker.py FOLDER RANK WORLD PORT ENGINE:ZERO:MICRO:REFERENCE ...
"""

from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from safetensors.numpy import save_file

from recray.config import Lora, Objective
from recray.data.examples import ExampleShards
from recray.lm.load import open_recommender
from recray.lm.lora import add_adapter
from recray.lm.scorer import ItemScorer
from recray.train.engine import DeepSpeedEngine, Engine, PlainEngine
from recray.train.feeding import AlignFeed, Share
from recray.train.order import Order
from recray.train.reference import scores_of_copy, scores_without_adapter
from recray.train.step import AlignStep, MarginCentre
from recray.train.units import Unit

STEPS = 3
OBJECTIVE = Objective(beta=0.5)
# A model as small as this one would stay gathered under ZeRO-3, and a save that forgets to gather would pass.
NOTHING_KEPT = {
    "stage3_max_live_parameters": 0,
    "stage3_max_reuse_distance": 0,
    "stage3_prefetch_bucket_size": 0,
    "stage3_param_persistence_threshold": 0,
}


def engine_of(folder: Path, kind: str, zero_stage: int) -> Engine:
    """An engine over the model of the folder with a fresh adapter."""
    model, _ = open_recommender(folder / "model")
    add_adapter(model, Lora(rank=3), seed=7)
    scorer, chosen = ItemScorer(model), {"weight_decay": 0.01, "clip_norm": 1.0}
    if kind == "plain":
        return PlainEngine(scorer, **chosen)
    extra = NOTHING_KEPT if zero_stage == 3 else {}
    return DeepSpeedEngine(scorer, **chosen, zero_stage=zero_stage, zero_settings=extra)


def train(folder: Path, rank: int, world: int, setting: str) -> None:
    """Take three steps, with several ranks interrupted after the second; write weights and metrics from rank 0."""
    kind, zero_stage, micro_batches, source = setting.split(":")
    _, catalogue = open_recommender(folder / "model")
    feed = AlignFeed(
        ExampleShards(folder / "shards"),
        catalogue,
        torch.from_numpy(np.load(folder / "item_vectors.npy")),
        Order(24, 9, 5),  # nine rows over two ranks: uneven
        Share(world, 10**6, int(micro_batches)),
        OBJECTIVE,
        num_negatives=3,
    )
    reference = None
    if source == "adapter_off":
        reference = scores_without_adapter
    elif source == "frozen_copy":
        reference = scores_of_copy(ItemScorer(open_recommender(folder / "model")[0]))
    step = AlignStep(OBJECTIVE, MarginCentre(), reference)

    def unit_of(number: int) -> Unit:
        unit = feed.unit(number, rank)
        if source != "table":
            unit.arrays["reference"] = np.full_like(unit.arrays["reference"], np.nan)
        return unit

    checkpoint = folder / f"{world}-{setting.replace(':', '-')}-checkpoint"
    for first, last in ((0, 2), (2, STEPS)) if world > 1 else ((0, STEPS),):
        engine = engine_of(folder, kind, int(zero_stage))
        engine.module.train()
        if first:
            engine.load(checkpoint, "state", saved_by=world)
        for number in range(first, last):
            result = step(engine, unit_of(number), learning_rate=1e-2)
        if last < STEPS:
            engine.save(checkpoint, "state")
            dist.barrier()
    weights = {name: tensor.numpy() for name, tensor in engine.whole_weights().items()}
    if rank == 0:
        metrics = np.array([result.metrics[name] for name in sorted(result.metrics)])
        save_file({**weights, "metrics": metrics}, folder / f"{world}-{setting.replace(':', '-')}.safetensors")


if __name__ == "__main__":
    from group import in_group  # beside this script: found when it is run, not when doctests are collected

    in_group(train)
