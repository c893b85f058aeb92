"""One rank of a group that takes one global batch however it can be cut; run by test_global_batch.py, never collected.

python grid_worker.py FOLDER RANK WORLD PORT TASK ...

A task is ENGINE:OBJECTIVE:CUT, train:ENGINE:CUT, naive:FORM:CUT, bytes:OBJECTIVE:CUT, poison:ENGINE:CUT or
spoilt_stream:ENGINE:CUT; each writes what it found into a file of its name, the last two from every rank. Engines are
made once a group, but for training.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from recray.config import Objective
from recray.data.examples import ExampleShards
from recray.distributed.collectives import sum_over_ranks
from recray.lm.load import open_recommender
from recray.lm.scorer import ItemScorer, Packed, sum_by_slot, to_device
from recray.objectives.margins import per_negative_margin
from recray.objectives.napo import napo_loss
from recray.objectives.watching import WATCHED
from recray.train.engine import DeepSpeedEngine, Engine, PlainEngine
from recray.train.feeding import AlignFeed, Share, StreamFeed, windows_of
from recray.train.order import Order
from recray.train.reference import ReferencePass
from recray.train.step import METRICS, AlignStep, MarginCentre, StepResult, stream_step
from recray.train.units import Unit

USERS, NEGATIVES = 24, 3
ORDER = Order(60, USERS, seed=0)  # its first batch is cut into exactly these sizes, though its rows differ in length
OBJECTIVES = {
    "napo": Objective(beta=0.5),  # sharing and a margin a negative
    "sdpo": Objective(name="sdpo", beta=0.5),
    "dpo": Objective(name="dpo", beta=0.5),
    "batch": Objective(beta=0.5, margin="batch"),
    "detached": Objective(beta=0.5, detach_shared=True),
    "normalised": Objective(beta=0.5, length_normalised=True, nll_weight=0.2),  # whose lengths travel, too
    "rodpo": Objective(name="rodpo", beta=0.5),  # with a draw a row
    "dynamicpo": Objective(name="dynamicpo", beta=0.5),
    # Its rows have as many candidates as they find items to borrow.
    "item": Objective(beta=0.5, reuse="item", reuse_items=4, sharing_fraction=0.1, guard_near="shrink"),
    "all": Objective(beta=0.5, sharing="threshold", sharing_threshold=-1.0, guard=False),
}
WHOLE = 10**6  # tokens: no budget


class Cut(NamedTuple):
    """How many workers, and what they pass through the model together."""

    share: Share
    sizes: list[list[int]]  # rows of each micro-batch of each rank


CUTS = {
    "1x24": Cut(Share(1, WHOLE), [[24]]),
    "1x4x6": Cut(Share(1, WHOLE, 6), [[4] * 6]),
    "2x12": Cut(Share(2, WHOLE), [[12]] * 2),
    "2x4x3": Cut(Share(2, WHOLE, 3), [[4] * 3] * 2),
    "3x8": Cut(Share(3, WHOLE), [[8]] * 3),
    "ragged": Cut(Share(3, 88), [[2, 2, 4, 0], [2, 2, 3, 1], [2, 3, 3, 0]]),  # by tokens, with empty passes
}
# A model as small as this one would stay gathered under ZeRO-3.
NOTHING_KEPT = {
    "stage3_max_live_parameters": 0,
    "stage3_max_reuse_distance": 0,
    "stage3_prefetch_bucket_size": 0,
    "stage3_param_persistence_threshold": 0,
}


class Naive(DeepSpeedEngine):
    """Several backwards and one step, without saying where the step ends."""

    def backward(self, loss: Tensor, *, last: bool) -> None:  # noqa: ARG002 - that is what is naive
        self._engine.backward(loss * self._world_size)


class Watched:
    """An engine that keeps the whole gradient of a step, before it is clipped."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.module, self.device = engine, engine.module, engine.device
        self.backward = engine.backward
        self.gradient: Tensor | None = None

    def step(self, learning_rate: float) -> float:
        inner: nn.Module = getattr(self.module, "module", self.module)
        self.gradient = torch.cat([self._whole(p).detach().cpu().flatten() for p in inner.parameters()])
        return self.engine.step(learning_rate)

    def _whole(self, parameter: Tensor) -> Tensor:
        if isinstance(self.engine, PlainEngine):
            return sum_over_ranks(parameter.grad)
        from deepspeed.utils import safe_get_full_grad

        whole = safe_get_full_grad(parameter)
        assert whole is not None
        return whole.clone()


class WatchedStep(AlignStep):
    """A step that keeps the scores of the global batch."""

    every: Tensor

    def _differentiate(self, every: Tensor, reference: Tensor, unit: Unit, lengths: Tensor | None = None) -> Any:
        self.every = every.detach().clone()
        return super()._differentiate(every, reference, unit, lengths)


@functools.cache
def feed_of(folder: Path, objective: str, cut: str) -> AlignFeed:
    """The feed of one objective and cut."""
    return AlignFeed(
        ExampleShards(folder / "shards"),
        open_recommender(folder / "model")[1],
        torch.from_numpy(np.load(folder / "item_vectors.npy")),
        ORDER,
        CUTS[cut].share,
        OBJECTIVES[objective],
        num_negatives=NEGATIVES,
    )


@functools.cache
def engine_of(folder: Path, name: str) -> Engine:
    """f64 and f32 are plain; z0 to z3 DeepSpeed; n0 to n3 DeepSpeed without a boundary."""
    dtype = torch.float64 if name == "f64" else torch.float32
    scorer = ItemScorer(open_recommender(folder / "model", dtype=dtype)[0])
    chosen: dict[str, Any] = {"weight_decay": 0.01, "clip_norm": 1.0}
    if name in ("f64", "f32"):
        engine: Engine = PlainEngine(scorer, **chosen)
    else:
        stage = int(name[1])
        kind = DeepSpeedEngine if name[0] == "z" else Naive
        engine = kind(scorer, **chosen, zero_stage=stage, zero_settings=NOTHING_KEPT if stage == 3 else {})
    engine.module.train()
    return engine


def unit_of(folder: Path, rank: int, objective: str, cut: str) -> Unit:
    """This rank's share of the first global batch, cut as it says; the reference far from the policy."""
    unit = feed_of(folder, objective, cut).unit(0, rank)
    assert objective == "item" or [micro.places.size for micro in unit.micro_batches] == CUTS[cut].sizes[rank]
    noise = np.random.default_rng(7).normal(scale=2.0, size=unit.arrays["reference"].shape)
    unit.arrays["reference"] += noise.astype(np.float32)
    return unit


def stream_unit_of(folder: Path, rank: int, cut: str) -> Unit:
    """This rank's share of a global batch of item streams."""
    histories = ExampleShards(folder / "shards").take(np.arange(ORDER.num_rows)).histories
    lengths = np.array([history.size for history in histories])
    order = Order(int(windows_of(lengths, 4)[0].size), USERS, seed=0)
    catalogue = open_recommender(folder / "model")[1]
    return StreamFeed(histories, catalogue, order, CUTS[cut].share, window_items=4).unit(0, rank)


def take(folder: Path, rank: int, _world: int, task: str) -> None:
    """Do one task and write what it found."""
    kind, what, cut = task.split(":")
    others = {"train": train, "naive": naive, "bytes": count_bytes, "poison": poison, "spoilt_stream": spoilt_stream}
    found = others[kind](folder, rank, what, cut) if kind in others else exact(folder, rank, kind, what, cut)
    stem = task.replace(":", "-")
    if kind in ("poison", "spoilt_stream"):
        np.savez(folder / f"{stem}-{rank}.npz", **found)
    elif rank == 0:
        np.savez(folder / f"{stem}.npz", **found)


def exact(folder: Path, rank: int, engine_name: str, objective: str, cut: str) -> dict[str, Any]:
    """Take the step at rate 0; return metrics, scores and the gradient of every weight."""
    engine = Watched(engine_of(folder, engine_name))
    if objective == "stream":
        result = stream_step(engine, stream_unit_of(folder, rank, cut), learning_rate=0.0)
        return {"metrics": [result.metrics["loss"]], "gradient": engine.gradient}
    step = WatchedStep(OBJECTIVES[objective], MarginCentre())
    result = step(engine, unit_of(folder, rank, objective, cut), learning_rate=0.0)
    metrics = [result.metrics[name] for name in (*METRICS, *WATCHED)]
    return {"metrics": metrics, "scores": step.every.cpu(), "gradient": engine.gradient}


def train(folder: Path, rank: int, name: str, cut: str) -> dict[str, Any]:
    """Take three steps of nine rows, uneven over two ranks; return weights before and after, and the last metrics."""
    share = CUTS[cut].share
    objective = OBJECTIVES["napo" if share.least_micro_batches == 1 else "batch"]
    feed = AlignFeed(
        ExampleShards(folder / "shards"),
        open_recommender(folder / "model")[1],
        torch.from_numpy(np.load(folder / "item_vectors.npy")),
        Order(ORDER.num_rows, 9, seed=5),
        share,
        objective,
        num_negatives=NEGATIVES,
    )
    engine, step = engine_of.__wrapped__(folder, name), AlignStep(objective, MarginCentre())
    before = digest(engine)
    for number in range(3):
        result = step(engine, feed.unit(number, rank), learning_rate=1e-2)
    metrics = [result.metrics[name] for name in (*METRICS, "grad_norm")]
    return {"before": before, "after": digest(engine), "metrics": metrics}


def naive(folder: Path, rank: int, form: str, cut: str) -> dict[str, Any]:
    """Take the step as it is often written; return its gradient."""
    engine, unit = Watched(engine_of(folder, "f64")), unit_of(folder, rank, "all", cut)
    passes, ranks = len(unit.micro_batches), dist.get_world_size()
    if form == "count":  # each micro-batch's own mean, then the mean of those
        weight = torch.zeros(USERS, dtype=torch.float64)
        for micro in unit.micro_batches:
            weight[micro.places] = USERS / max(1, micro.places.size) / passes / ranks
        step = AlignStep(OBJECTIVES["all"], MarginCentre())
        whole = step._objective
        step._objective = lambda batch: whole(batch) * weight[batch.place]
        step(engine, unit, learning_rate=0.0)
        return {"gradient": engine.gradient}
    for number, micro in enumerate(unit.micro_batches):
        packed = to_device(micro.layout, "cpu")
        score = sum_by_slot(engine.module(packed), packed)
        loss = (score * 0.0).sum()
        if micro.places.size:
            loss = naive_loss(score.view(micro.places.size, -1), micro.places, unit).sum() / USERS
        engine.backward(loss, last=number == passes - 1)
    engine.step(0.0)
    return {"gradient": engine.gradient}


def naive_loss(score: Tensor, places: np.ndarray, unit: Unit) -> Tensor:
    """NAPO of one micro-batch by itself: who is not in it lends nothing."""
    rows = np.flatnonzero(np.isin(unit.arrays["place"], places))
    order = unit.arrays["place"][rows]
    back = np.array([np.flatnonzero(places == place)[0] for place in order])
    ratio = score[back] - torch.from_numpy(unit.arrays["reference"][order])
    usable = torch.from_numpy(unit.arrays["usable"][rows][:, order])
    sure = torch.from_numpy(unit.arrays["confidence"][rows][:, order]).double()
    settings = OBJECTIVES["all"]
    margin = per_negative_margin(sure, base=settings.margin_base, slope=settings.margin_slope)
    return napo_loss(ratio[:, 0], ratio[:, 1:], margin, usable, beta=settings.beta)


def count_bytes(folder: Path, rank: int, objective: str, cut: str) -> dict[str, Any]:
    """Return the bytes of each tensor that a step puts into collectives, the engine's own left out."""
    engine, sizes = Watched(engine_of(folder, "f64")), []
    reduce: Callable[..., Any] = dist.all_reduce

    def counted(tensor: Tensor, *args: Any, **options: Any) -> Any:
        sizes.append(tensor.numel() * tensor.element_size())
        return reduce(tensor, *args, **options)

    def stop(_: float) -> float:
        dist.all_reduce = reduce
        engine.module.zero_grad()
        return 0.0

    engine.step = stop  # type: ignore[method-assign]
    unit = unit_of(folder, rank, objective, cut)
    dist.all_reduce = counted
    AlignStep(OBJECTIVES[objective], MarginCentre())(engine, unit, learning_rate=0.0)
    return {"sizes": sizes}


def poison(folder: Path, rank: int, name: str, cut: str) -> dict[str, Any]:
    """Spoil one rank's reference, margin and gradient in turn; return what this rank says, and what was left of it."""
    engine, centre = engine_of(folder, name), MarginCentre(0.25)
    found: dict[str, Any] = {"before": digest(engine)}
    unit = unit_of(folder, rank, "batch", cut)
    place = int(unit_of(folder, 0, "batch", cut).micro_batches[-1].places[-1])
    found |= {"place": place, "rows": unit.rows}
    step = AlignStep(OBJECTIVES["batch"], centre, reference_of(unit, place if rank == 0 else None))
    note(found, "reference", step(engine, unit, learning_rate=1.0))

    step, margin = AlignStep(OBJECTIVES["batch"], centre), unit.arrays["liking_sum"].copy()
    unit.arrays["liking_sum"] = np.array([np.nan]) if rank == 0 else margin
    note(found, "margin", step(engine, unit, learning_rate=1.0))
    unit.arrays["liking_sum"] = margin
    note(found, "gradient", step(Overflowing(engine, breaks=rank == 0), unit, learning_rate=1.0))

    found |= {"after": digest(engine), "centre": centre.value}
    watched = Watched(engine)  # and the step after is none the worse
    note(
        found,
        "good",
        AlignStep(OBJECTIVES["napo"], centre)(watched, unit_of(folder, rank, "napo", cut), learning_rate=0.0),
    )
    return found | {"good_gradient": watched.gradient}


def spoilt_stream(folder: Path, rank: int, name: str, cut: str) -> dict[str, Any]:
    """Give one row of rank 0 a log-probability of minus infinity, whose own gradient is finite."""
    engine = engine_of(folder, name)
    found: dict[str, Any] = {"before": digest(engine)}
    unit = stream_unit_of(folder, rank, cut)
    found["row"] = unit.rows[int(stream_unit_of(folder, 0, cut).micro_batches[0].places[0])]
    first = unit.micro_batches[0].layout

    def spoil(_module: nn.Module, inputs: tuple[Packed], out: Tensor) -> Tensor:
        if rank or inputs[0].label.shape != first.label.shape or not np.array_equal(inputs[0].label, first.label):
            return out
        return out + torch.where(inputs[0].slot == 0, -torch.inf, 0.0)

    inner: nn.Module = getattr(engine.module, "module", engine.module)
    hook = inner.register_forward_hook(spoil)
    note(found, "stream", stream_step(engine, unit, learning_rate=1.0))
    hook.remove()
    return found | {"after": digest(engine)}


def reference_of(unit: Unit, spoilt: int | None) -> ReferencePass:
    """The unit's own reference as if made in training, with one infinity."""
    table = torch.from_numpy(unit.arrays["reference"]).double()
    if spoilt is not None:
        table[spoilt, 2] = torch.inf

    def scores(_engine: Engine, _packs: list[Packed]) -> list[Tensor]:
        each = [table[micro.places].flatten() for micro in unit.micro_batches]
        return [own if own.numel() else torch.zeros(1, dtype=torch.float64) for own in each]

    return scores


def note(found: dict[str, Any], what: str, result: StepResult) -> None:
    found[f"{what}_skipped"], found[f"{what}_rows"] = result.skipped, np.array(result.bad_rows)


def digest(engine: Engine) -> np.ndarray:
    """All weights in one row."""
    weights = engine.whole_weights()
    return np.concatenate([weights[name].double().numpy().ravel() for name in sorted(weights)])


class Overflowing:
    """An engine whose backward overflows on some ranks, though every score is finite."""

    def __init__(self, engine: Engine, *, breaks: bool) -> None:
        self.module, self.device, self.step = engine.module, engine.device, engine.step
        self._engine, self._breaks = engine, breaks

    def backward(self, loss: Tensor, *, last: bool) -> None:
        self._engine.backward(loss * float("inf") if self._breaks else loss, last=last)


if __name__ == "__main__":
    from group import in_group  # beside this script: found when it is run, not when doctests are collected

    in_group(take)
