"""S-DPO on the rows, negatives and model of `movielens`: what NAPO is compared with."""

from pipelines.recipes.movielens import movielens
from recray.config import Objective, Pipeline


def sdpo() -> Pipeline:
    """`movielens` with S-DPO: a softmax over each user's own negatives, no margin, nothing shared."""
    base = movielens()
    objective = Objective(name="sdpo", margin="none", sharing="none")
    return base.model_copy(update={"name": "sdpo", "align": base.align.model_copy(update={"objective": objective})})
