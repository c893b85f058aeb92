"""Two ranks train one process's adapter under every ZeRO stage and reference, across a checkpoint, and hand it over."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from safetensors.torch import load_file as load_tensors

from recray.config import Lora
from recray.lm.load import load_model, open_recommender
from recray.lm.lora import add_adapter, load_adapter, merge_adapter, save_adapter
from recray.lm.scorer import ItemScorer, score_rows

# ENGINE:ZERO:MICRO:REFERENCE
SETTINGS = [
    *("plain:0:1:frozen_copy", "plain:0:3:adapter_off"),
    *("deepspeed:0:1:adapter_off", "deepspeed:1:1:table", "deepspeed:2:3:adapter_off"),
    *("deepspeed:3:1:adapter_off", "deepspeed:3:3:frozen_copy"),
]
ONE = "1-plain-0-1-table.safetensors"


@pytest.fixture(scope="module")
def trained(folder: Path, run_group: Callable[[str, int, list[str]], None]) -> Path:
    """The folder with the adapters that every setting trained."""
    run_group("adapter_worker.py", 1, ["plain:0:1:table"])
    run_group("adapter_worker.py", 2, SETTINGS)
    return folder


@pytest.mark.parametrize("setting", SETTINGS)
def test_every_reference_and_engine_trains_the_adapter_of_one_process(trained: Path, setting: str) -> None:
    one, other = load_file(trained / ONE), load_file(trained / f"2-{setting.replace(':', '-')}.safetensors")
    assert one.keys() == other.keys()
    assert all(".lora_" in weight or weight == "metrics" for weight in other)
    np.testing.assert_allclose(other.pop("metrics"), one.pop("metrics"), rtol=2e-4, atol=2e-5)
    size = np.sqrt(sum(np.square(tensor).sum() for tensor in one.values()))
    apart = np.sqrt(sum(np.square(one[weight] - other[weight]).sum() for weight in one))
    assert apart < 1e-3 * size


def test_checkpoints_hold_nothing_of_the_frozen_base(trained: Path) -> None:
    for setting in ("plain:0:3:adapter_off", "deepspeed:1:1:table", "deepspeed:3:1:adapter_off"):
        checkpoint = trained / f"2-{setting.replace(':', '-')}-checkpoint"
        files = [file for file in checkpoint.rglob("*.pt") if "optim" not in file.name]
        assert files
        for file in files:
            names = torch.load(file, weights_only=False)["module"].keys()
            assert names
            assert all(".lora_" in name for name in names)


def test_what_zero_3_hands_over_scores_alike_merged_and_loaded(trained: Path, tmp_path: Path) -> None:
    weights = load_tensors(trained / "2-deepspeed-3-1-adapter_off.safetensors")
    del weights["metrics"]
    model, catalogue = open_recommender(trained / "model")
    histories, items = [np.array([3, 1, 4]), np.array([5])], [np.arange(6), np.arange(10, 14)]

    def scores(model: torch.nn.Module) -> np.ndarray:
        rows = score_rows(ItemScorer(model).eval(), catalogue, histories, items, tokens_per_micro_batch=999)
        return np.concatenate(rows)

    base = scores(model)
    add_adapter(model, Lora(rank=3), seed=0)
    unexpected = ItemScorer(model).load_state_dict(weights, strict=False).unexpected_keys
    assert not unexpected
    expected = scores(model)
    assert np.abs(expected - base).max() > 0.01
    save_adapter(tmp_path, model)
    merge_adapter(model)
    np.testing.assert_allclose(scores(model), expected, atol=1e-5, rtol=0)
    again, _ = load_model(trained / "model", dtype=torch.float32)
    load_adapter(again, tmp_path)
    np.testing.assert_array_equal(scores(again), expected)
