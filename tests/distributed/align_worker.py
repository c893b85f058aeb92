"""One rank of a group that aligns a small model under every engine; run by test_many_equals_one.py, never collected.

python align_worker.py FOLDER RANK WORLD PORT ENGINE[:ZERO]:MICRO ...
"""

from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save_file

from recray.config import Objective
from recray.data.examples import ExampleShards
from recray.lm.load import open_recommender
from recray.lm.scorer import ItemScorer
from recray.train.engine import make_engine
from recray.train.feeding import AlignFeed, Share
from recray.train.order import Order
from recray.train.step import AlignStep, MarginCentre

STEPS = 3


def train(folder: Path, rank: int, world: int, setting: str) -> None:
    """Take three steps and write, from rank 0, the weights and the metrics of the last step."""
    kind, zero_stage, micro_batches = setting.split(":")
    model, catalogue = open_recommender(folder / "model")
    engine = make_engine(ItemScorer(model), kind=kind, weight_decay=0.01, clip_norm=1.0, zero_stage=int(zero_stage))
    objective = Objective(margin="batch" if micro_batches == "3" else "per_negative")
    feed = AlignFeed(
        ExampleShards(folder / "shards"),
        catalogue,
        torch.from_numpy(np.load(folder / "item_vectors.npy")),
        Order(24, 9, 5),  # nine rows over two ranks: uneven
        Share(world, 10**6, int(micro_batches)),
        objective,
        num_negatives=3,
    )
    step = AlignStep(objective, MarginCentre())
    engine.module.train()
    for number in range(STEPS):
        result = step(engine, feed.unit(number, rank), learning_rate=1e-2)
    weights = {name: tensor.numpy() for name, tensor in engine.whole_weights().items()}
    if rank == 0:
        metrics = np.array([result.metrics[name] for name in sorted(result.metrics)])
        save_file({**weights, "metrics": metrics}, folder / f"{world}-{kind}-{zero_stage}-{micro_batches}.safetensors")


if __name__ == "__main__":
    from group import in_group  # beside this script: found when it is run, not when doctests are collected

    in_group(train)
