"""One rank of a fit over gloo: `python fit_worker.py RANK WORLD STORE OUT SAMPLER`.

SAMPLER is '' for a full softmax; with ` unseen` behind it the model is fitted without the users of the first fold, with
half of the histories shuffled.
"""

import json
import sys
from pathlib import Path

import pyarrow as pa
import torch
import torch.distributed as dist

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2])]

from walks import NUM_ITEMS, histories_and_validation  # noqa: E402

from recray.config import Users  # noqa: E402
from recray.users.crossfit import Log, folds_of, without  # noqa: E402
from recray.users.fit import fit  # noqa: E402
from recray.users.sasrec import SASRec, Shape, save  # noqa: E402


def main(rank: int, world: int, store: str, out: str, sampler: str) -> None:
    """Fit two passes and save the model and its curve, on rank 0."""
    torch.set_num_threads(1)
    if world > 1:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    sampler, _, unseen = sampler.partition(" ")
    hard = {"hardest": 5} if sampler.startswith("adaptive") else {}
    sampled = {"loss": "sampled_softmax", "sampler": sampler, "sampled_negatives": 16, **hard} if sampler else {}
    # A batch of 7: unequal shares.
    settings = Users(**sampled, passes=2, global_batch=7, dropout=0.0, shuffled=0.5 if unseen else 0.0)
    model = SASRec(Shape(NUM_ITEMS, 8, 1, 2, 6, 0.0), seed=0)
    histories, validation = histories_and_validation(40)
    if unseen:
        folds = folds_of(pa.array([f"user {number}" for number in range(40)]), seed=1)
        histories, validation, *_ = without(0, Log(histories, validation, folds, folds))
    curve = fit(model, histories, validation, settings, seed=1, report=lambda _: None)
    if rank == 0:
        save(model, Path(out))
        (Path(out) / "curve.json").write_text(json.dumps(curve))
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4], sys.argv[5])
