"""Ray Data from one row of a table to one row of another, counted. Shared by `users` and `negatives`."""

import numpy as np
import pyarrow as pa
import pyarrow.dataset as pads
import ray
from ray.data import Dataset

from recray.errors import DataError
from recray.stages.flow import Job
from recray.workspace import Workspace

READ_CPUS = 0.25  # reading must always find room beside the actors that compute


def read_rows(workspace: Workspace, stage: str, name: str, columns: list[str]) -> tuple[Dataset, np.ndarray]:
    """Return these columns of a finished table as a stream, and its row ids."""
    rows = workspace.table(stage, name, ["row"])["row"].to_numpy()
    dataset = ray.data.read_parquet(
        workspace.path(stage, name),
        filesystem=workspace.fs,
        num_cpus=READ_CPUS,
    ).select_columns(columns)
    return dataset, rows


def write_rows(job: Job, name: str, dataset: Dataset, rows: np.ndarray, schema: pa.Schema) -> None:
    """Write a stream as a table of the stage, and see that its row ids are `rows`, each once, in any order.

    Raises:
        DataError: if a row is lost or doubled.
    """
    if len(rows) == 0:
        job.out.write_table(name, schema.empty_table())
        return
    dataset.write_parquet(job.out.path(name), filesystem=job.out.fs)
    table = pads.dataset(job.out.path(name), filesystem=job.out.fs, format="parquet").to_table(columns=["row"])
    written = table["row"].to_numpy()
    if not np.array_equal(np.sort(written), np.sort(rows)):
        missing = len(np.setdiff1d(rows, written))
        raise DataError(
            f"{job.out.stage}/{name}: expected {len(rows)} rows, got {len(written)}, and {missing} of those expected "
            "are missing; run the stage again"
        )
    job.out.counts[name] = len(written)
