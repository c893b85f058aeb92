"""Low-rank adapters in place: the Hugging Face model stays itself, its linear layers grow two thin matrices each.

With weights W frozen, a layer returns W x + (alpha / rank) B A x and only A [rank, in] and B [out, rank] are trained. B
starts at zero, so a fresh adapter changes nothing. Hu et al., LoRA, arXiv 2106.09685, equation 3; on a base in 4-bit
NormalFloat, Dettmers et al., QLoRA, arXiv 2305.14314.

An adapter's folder (`adapter_config.json`, `adapter_model.safetensors`) is one that `PeftModel.from_pretrained` reads.

peft is imported where an adapter is: it takes longer to import than a small model takes to load, in every process.
"""

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from recray.config import Lora
from recray.errors import ConfigError, ModelError

WEIGHTS_FILE = "adapter_model.safetensors"
_PREFIX = "base_model.model."  # before every name in peft's files
_NAME = "default"  # peft's, of the only adapter of a model


def add_adapter(model: PreTrainedModel, lora: Lora, *, seed: int, base: str | None = None) -> None:
    """Freeze `model` and give it a fresh adapter, the same for the same seed; its scores stay as they are.

    The caller's random state is left as it was. Under ZeRO the adapter must be there before the engine is made.

    Args:
        model: Changed in place; without an adapter so far.
        lora: Rank, alpha, dropout and which layers.
        seed: Of A. All ranks need the same one.
        base: What the adapter's folder says it belongs to.

    Raises:
        ConfigError: if a name in `lora.target_modules` is none of the model's linear layers.
    """
    from peft import LoraConfig, inject_adapter_in_model

    check_targets(model, lora)
    names = lora.target_modules
    settings = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=names if isinstance(names, str) else list(names),
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
        task_type="CAUSAL_LM",
        base_model_name_or_path=base,
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        inject_adapter_in_model(settings, model)


def check_targets(model: PreTrainedModel, lora: Lora) -> None:
    """Raise `ConfigError` unless every name in `lora.target_modules` is that of a linear layer before the head.

    Embeddings and head stay frozen: they are one matrix in many models, and merging into one would change the other.
    """
    head = model.get_output_embeddings()
    linear = [name for name, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D) and m is not head]
    wanted = [] if lora.target_modules == "all-linear" else lora.target_modules
    for target in wanted:
        if not any(name == target or name.endswith(f".{target}") for name in linear):
            known = sorted({name.rpartition(".")[2] for name in linear})
            raise ConfigError(
                f"lora.target_modules names {target!r}, but no linear layer of {type(model).__name__} before its head "
                f"is called so; there are: {', '.join(known)}"
            )


def has_adapter(module: nn.Module) -> bool:
    """Return whether an adapter is in there."""
    return bool(_adapted(module))


@contextmanager
def adapter_off(module: nn.Module) -> Iterator[None]:
    """Let `module` score as its frozen base does, inside the `with` block; for passes without gradient."""
    layers = _adapted(module).values()
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def save_adapter(folder: Path, model: PreTrainedModel) -> None:
    """Write the adapter of `model`, and nothing of its base, to `folder`, as peft does."""
    folder.mkdir(parents=True, exist_ok=True)
    model.peft_config[_NAME].save_pretrained(str(folder))
    weights = {_PREFIX + _in_file(name): tensor.detach().cpu().contiguous() for name, tensor in _weights(model).items()}
    save_file(weights, folder / WEIGHTS_FILE, metadata={"format": "pt"})


def load_adapter(model: PreTrainedModel, folder: Path) -> None:
    """Freeze `model` and give it the adapter in `folder`, in place.

    Raises:
        ModelError: if the folder is no adapter, or belongs to another model.
    """
    from peft import LoraConfig, inject_adapter_in_model

    try:
        settings = LoraConfig.from_pretrained(str(folder))
        found = load_file(folder / WEIGHTS_FILE)
        inject_adapter_in_model(settings, model)
    except (OSError, ValueError, TypeError, KeyError, SafetensorError) as error:
        raise ModelError(
            f"{folder}: the adapter can't be loaded ({type(error).__name__}: {error}); expected adapter_config.json "
            f"and {WEIGHTS_FILE} of an adapter of this model"
        ) from error
    weights = _weights(model)
    expected = {_PREFIX + _in_file(name): tuple(tensor.shape) for name, tensor in weights.items()}
    there = {name: tuple(tensor.shape) for name, tensor in found.items()}
    if expected != there:
        wrong = sorted(set(expected.items()) ^ set(there.items()))[0]
        raise ModelError(
            f"{folder} is not an adapter of this model: {wrong[0]} {list(wrong[1])} is in one of them only"
        )
    with torch.no_grad():
        for name, tensor in weights.items():
            tensor.copy_(found[_PREFIX + _in_file(name)])


def merge_adapter(model: PreTrainedModel) -> None:
    """Add the adapter to the weights under it, W + (alpha / rank) B A, and take it out; in place.

    In float32 the scores are those of base and adapter to rounding; in bfloat16 the sum itself is rounded.
    """
    for name, layer in _adapted(model).items():
        layer.merge(safe_merge=True)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer.get_base_layer())
    del model.peft_config
    model.requires_grad_(True)


def require_nf4() -> None:
    """Raise `ModelError` unless a model can be quantised here: bitsandbytes is installed and there is a GPU."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ModelError(
            "sft.model.quantization is nf4, which needs bitsandbytes; install recray with its extra, "
            "`pip install 'recray[quantization]'`, or set sft.model.quantization=none"
        )
    if not torch.cuda.is_available():
        raise ModelError(
            "sft.model.quantization is nf4, which needs a CUDA GPU, and there is none here; set "
            "sft.model.quantization=none, or start workers where there is one"
        )


def nf4_settings(dtype: torch.dtype) -> Any:
    """Return transformers' settings for 4-bit NormalFloat that computes in `dtype`; raises as `require_nf4`."""
    require_nf4()
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def _adapted(module: nn.Module) -> dict[str, Any]:
    """Return peft's layers of a module by name."""
    if "peft" not in sys.modules:  # then none of its layers is anywhere
        return {}
    from peft.tuners.lora import LoraLayer

    return {name: layer for name, layer in module.named_modules() if isinstance(layer, LoraLayer)}


def _weights(model: nn.Module) -> dict[str, Tensor]:
    """Return A and B of every layer by their names in the model."""
    return {name: tensor for name, tensor in model.named_parameters() if f".{_NAME}.weight" in name and "lora_" in name}


def _in_file(name: str) -> str:
    return name.replace(f".{_NAME}.weight", ".weight")
