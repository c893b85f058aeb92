"""Trials of a search for TensorBoard's HParams page: settings beside what came out, and the curves."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from recray.train.search import DIRECTIONS, Trial


def write_hparams(folder: Path, trials: Iterable[Trial]) -> None:
    """Write a folder of events a trial below `folder`: its settings, its validations, and its best one."""
    for trial in trials:
        settings: dict[str, Any] = {name: value for name, value in trial.settings.items() if value is not None}
        best = trial.best
        results = {} if best is None else {f"best/{goal}": best[goal] for goal in DIRECTIONS}
        writer = SummaryWriter(str(folder / f"trial-{trial.number:04d}"))
        for summary in hparams({**settings, "seed": trial.seed}, results):  # type: ignore[no-untyped-call]
            writer._get_file_writer().add_summary(summary)  # type: ignore[no-untyped-call]
        for name, value in results.items():
            writer.add_scalar(name, value)
        for look in trial.curve:
            for goal in DIRECTIONS:
                writer.add_scalar(f"validation/{goal}", look[goal], int(look["step"]))
        writer.close()
