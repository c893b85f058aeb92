"""One rank of a group that goes on from checkpoints of another number of ranks; run by test_resharding.py.

python reshard_worker.py FOLDER RANK WORLD PORT FIRST:LAST:SAVED_BY

Every engine takes steps FIRST to LAST on a small network of odd widths, of which a part may be frozen.
"""

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from recray.train.engine import DeepSpeedEngine, Engine, PlainEngine

ENGINES = ("plain:0:all", *(f"deepspeed:{stage}:all" for stage in range(4)), "deepspeed:2:part", "deepspeed:3:part")
# A model as small as this one would stay gathered under ZeRO-3.
NOTHING_KEPT = {
    "stage3_max_live_parameters": 0,
    "stage3_max_reuse_distance": 0,
    "stage3_prefetch_bucket_size": 0,
    "stage3_param_persistence_threshold": 0,
}


def engine_of(setting: str) -> Engine:
    """An engine with the weights that all start from."""
    kind, stage, trained = setting.split(":")
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 7), nn.Tanh(), nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 1))
    if trained == "part":
        module[0].requires_grad_(False)
    if kind == "plain":
        return PlainEngine(module, weight_decay=0.1, clip_norm=1.0)
    extra = NOTHING_KEPT if stage == "3" else {}
    return DeepSpeedEngine(module, weight_decay=0.1, clip_norm=1.0, zero_stage=int(stage), zero_settings=extra)


def train(folder: Path, rank: int, world: int, setting: str) -> None:
    """Go on with every engine, and leave checkpoints and weights."""
    first, last, saved_by = map(int, setting.split(":"))
    rows = torch.randn(12, 4, generator=torch.Generator().manual_seed(5))
    for each in ENGINES:
        name = each.replace(":", "-")
        engine = engine_of(each)
        if first:
            engine.load(folder / f"{name}-{first}", "state", saved_by=saved_by)
        for step in range(first, last):
            loss = (engine.module(rows[rank::world] + 0.1 * step) - 1).square().sum() / len(rows)
            engine.backward(loss, last=True)
            engine.step(1e-2)
        engine.save(folder / f"{name}-{last}", "state")
        weights = engine.whole_weights()
        if rank == 0:
            save_file(weights, folder / f"{name}-{first}-{last}.safetensors")


if __name__ == "__main__":
    from group import in_group  # beside this script: found when it is run, not when doctests are collected

    in_group(train)
