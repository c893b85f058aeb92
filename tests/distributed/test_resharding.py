"""A checkpoint of two ranks goes on with one, and that one's with three, under every engine and ZeRO stage."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

ENGINES = [
    "plain-0-all",
    *(f"deepspeed-{stage}-all" for stage in range(4)),
    *("deepspeed-2-part", "deepspeed-3-part"),
]


@pytest.fixture(scope="module")
def trained(folder: Path, run_group: Callable[[str, int, list[str]], None]) -> Path:
    """The folder with the weights of nine steps: of one process, and of two, then one, then three."""
    run_group("reshard_worker.py", 1, ["0:9:0"])
    for leftover in folder.glob("*-9"):
        shutil.rmtree(leftover)
    run_group("reshard_worker.py", 2, ["0:3:0"])
    run_group("reshard_worker.py", 1, ["3:6:2"])
    run_group("reshard_worker.py", 3, ["6:9:1"])
    return folder


@pytest.mark.parametrize("engine", ENGINES)
def test_a_changed_number_of_ranks_ends_with_the_weights_of_one_process(trained: Path, engine: str) -> None:
    one, other = load_file(trained / f"{engine}-0-9.safetensors"), load_file(trained / f"{engine}-6-9.safetensors")
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert (tensor - other[name]).abs().max() < 1e-6, name
