"""NAPO with the objective of its released code, for comparison with recray's own defaults."""

from pipelines.recipes.movielens import movielens
from recray.config import Objective, Pipeline


def napo_as_released() -> Pipeline:
    """`movielens` with NAPO as released: policy only, one margin a batch, shared scores detached."""
    base = movielens()
    objective = Objective(
        name="napo",
        beta=1.0,
        reference=False,
        margin="batch",
        margin_base=1.0,
        margin_slope=0.3,
        sharing="top_fraction",
        sharing_fraction=0.7,
        similarity="dot",
        guard=False,
        detach_shared=True,
    )
    # The release shares within the micro-batches of its four workers, 16 users, not the accumulated batch.
    align = base.align.model_copy(update={"objective": objective, "global_batch": 16})
    return base.model_copy(update={"name": "napo_as_released", "align": align})
