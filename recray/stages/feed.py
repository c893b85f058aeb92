"""The ordered feed of a fit: Ray Data executing a pure plan. Shared by all that fit a language model.

One block holds one unit (the share of one rank in one step), blocks keep their order, and a streaming split of equal
blocks over W readers hands block b to reader b mod W: so rank r gets its units in order of steps, whatever the data
tasks' timing. The loop checks the stamp of each.

Light to import: beside the trainers, some five processes of a fit pass this on or number units, and would each import a
language model's libraries for seconds if they had to know what a feed is made of.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import pyarrow as pa
import ray
from ray import cloudpickle
from ray.data import ActorPoolStrategy, DataIterator, Dataset, Datasource, ReadTask
from ray.data.block import BlockMetadata
from ray.train import DataConfig

from recray.train.checkpoint import CheckpointStore
from recray.train.units import Unit, pack_unit

FEED_CPUS = 0.25
UNITS_A_TASK = 16
NUMBER_CPUS = 0.1
UNITS = "units"

T = TypeVar("T")


class Sealed(Generic[T]):
    """Something that is unpickled, and its modules imported, only where it is opened or called."""

    def __init__(self, content: T) -> None:
        self._pickled: bytes = cloudpickle.dumps(content)

    def open(self) -> T:
        """Return what is in it."""
        content: T = cloudpickle.loads(self._pickled)
        return content

    def __call__(self, argument: Any) -> Any:
        """Call what is in it."""
        content: Any = self.open()
        return content(argument)


class Feed(Protocol):
    """Makes units; see recray.train.feeding."""

    def unit(self, step: int, rank: int) -> Unit:
        """Return the unit of one rank in one step."""


MakeFeed = Callable[[int], Feed]  # from the number of ranks


class LoadUnit:
    """Ray Data actor: from the number of a unit to the unit itself; nothing for numbers from `steps` on."""

    def __init__(self, make_feed: MakeFeed, world_size: int, first_step: int, steps: int) -> None:
        import torch

        torch.set_num_threads(1)
        self._feed, self._world_size = make_feed(world_size), world_size
        self._first_step, self._steps = first_step, steps

    def __call__(self, batch: dict[str, np.ndarray]) -> pa.Table:
        (number,) = batch["id"].tolist()
        step, rank = divmod(number, self._world_size)
        step += self._first_step
        units = [pack_unit(self._feed.unit(step, rank))] if step < self._steps else []
        return pa.table({"unit": pa.array(units, pa.binary())})


class UnitNumbers(Datasource):  # type: ignore[misc]  # ray.data is untyped
    """The numbers from 0 to `count`, and on until all tasks have as many; one a block.

    A task makes several blocks, as every task costs memory and time of the process that deals blocks out, before the
    first step already (5,000 units: 13 s until the first with one a task, 6 s with sixteen).

    As `ray.data.range`, but for how little of a CPU its tasks ask: on a small cluster whose CPUs the trainers hold, a
    task that asks for a whole one would never start, and trainers and feed would wait for each other for ever.
    """

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = -(-count // UNITS_A_TASK) * UNITS_A_TASK

    def estimate_inmemory_data_size(self) -> int:
        """Return bytes."""
        return 8 * self.count

    def get_read_tasks(
        self,
        parallelism: int,  # noqa: ARG002 - one block a number, whatever the cluster
        per_task_row_limit: int | None = None,  # noqa: ARG002
        data_context: Any = None,  # noqa: ARG002
    ) -> list[ReadTask]:
        """Return tasks of `UNITS_A_TASK` numbers, which Ray cuts into blocks of one."""
        some = BlockMetadata(num_rows=UNITS_A_TASK, size_bytes=8 * UNITS_A_TASK, exec_stats=None)
        return [ReadTask(partial(_numbers, first), some) for first in range(0, self.count, UNITS_A_TASK)]


def _numbers(first: int) -> list[pa.Table]:
    return [pa.table({"id": pa.array(range(first, first + UNITS_A_TASK), pa.int64())})]


def unit_dataset(make_feed: MakeFeed, world_size: int, *, first_step: int, steps: int) -> Dataset:
    """Return the units of steps first_step .. steps - 1, one a block, ordered by (step, rank)."""
    numbered = UnitNumbers(max(1, (steps - first_step) * world_size))
    # One task at a time: tasks that ask for next to nothing would otherwise start a process each, by the dozen.
    numbers = ray.data.read_datasource(
        numbered, num_cpus=NUMBER_CPUS, concurrency=1, override_num_blocks=numbered.count
    )
    dataset = numbers.map_batches(
        LoadUnit,
        batch_size=1,
        batch_format="numpy",
        compute=ActorPoolStrategy(size=1),
        num_cpus=FEED_CPUS,
        fn_constructor_args=(make_feed, world_size, first_step, steps),
    )
    dataset.context.execution_options.preserve_order = True
    dataset.context.enable_progress_bars = False
    dataset.context.print_on_execution_start = False
    return dataset


class OrderedFeed(DataConfig):  # type: ignore[misc]  # ray.train is untyped
    """Gives every rank its own units in order, for whatever number of ranks the group (re)starts with."""

    def __init__(self, make_feed: MakeFeed, steps: int, store: CheckpointStore) -> None:
        super().__init__()
        self._make_feed, self._steps, self._store = make_feed, steps, store

    def configure(
        self,
        datasets: dict[str, Dataset],  # noqa: ARG002 - units follow from the plan, not from a data set
        world_size: int,
        worker_handles: Any,  # noqa: ARG002
        worker_node_ids: Any,  # noqa: ARG002
        **_: Any,
    ) -> list[dict[str, DataIterator]]:
        """Return one iterator a rank, from the step of the newest checkpoint on."""
        newest = self._store.newest(tell=False)  # while ranks may be writing their first one
        first = 0 if newest is None else newest.step
        units = unit_dataset(self._make_feed, world_size, first_step=first, steps=self._steps)
        return [{UNITS: iterator} for iterator in units.streaming_split(world_size, equal=False)]
