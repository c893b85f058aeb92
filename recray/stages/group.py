"""What Ray Train is told of a group of workers. Light to import: every process of a fit does."""

from ray.train import ScalingConfig

from recray.config import Resources


def scaling(resources: Resources) -> ScalingConfig:
    """Return how many workers Ray Train starts, and what it sets aside for each."""
    each: dict[str, float] = {"CPU": resources.cpus_per_worker}
    if resources.gpus_per_worker > 0:
        each["GPU"] = resources.gpus_per_worker
    number = resources.num_workers
    return ScalingConfig(
        num_workers=number if resources.min_workers is None else (resources.min_workers, number),
        use_gpu=resources.gpus_per_worker > 0,
        resources_per_worker=each,
    )


def backend(resources: Resources) -> str:
    """Return what workers' collectives run on."""
    return "nccl" if resources.gpus_per_worker > 0 else "gloo"
