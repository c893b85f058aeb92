"""Two ranks, under every ZeRO stage and cut into micro-batches or not, end with the weights of one plain process."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

CUTS = [1, 3]  # micro-batches a rank and step: one keeps its graph, three take a second pass


@pytest.fixture(scope="module")
def trained(folder: Path, run_group: Callable[[str, int, list[str]], None]) -> Path:
    """The folder with what every setting made of the model."""
    worker = "align_worker.py"
    run_group(worker, 1, [f"plain:0:{cut}" for cut in CUTS])
    run_group(worker, 2, [f"plain:0:{cut}" for cut in CUTS])
    run_group(worker, 2, [f"deepspeed:{stage}:{cut}" for stage in (0, 1, 2, 3) for cut in CUTS])
    return folder


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize(("kind", "stage"), [("plain", 0), *(("deepspeed", stage) for stage in (0, 1, 2, 3))])
def test_two_ranks_end_with_the_weights_of_one(trained: Path, kind: str, stage: int, cut: int) -> None:
    one = load_file(trained / f"1-plain-0-{cut}.safetensors")
    two = load_file(trained / f"2-{kind}-{stage}-{cut}.safetensors")
    assert one.keys() == two.keys()
    np.testing.assert_allclose(two.pop("metrics"), one.pop("metrics"), rtol=2e-4, atol=2e-5)
    start = load_file(trained / "model" / "model.safetensors")
    moved = np.sqrt(sum(np.square(one[f"model.{name}"] - value).sum() for name, value in start.items()))
    apart = np.sqrt(sum(np.square(one[name] - two[name]).sum() for name in one))
    assert moved > 0.1
    assert apart < 1e-3 * moved
