"""Gradients and updates of one model on one rank: plain, or under DeepSpeed ZeRO. The only importer of deepspeed.

Both sum gradients over ranks: the losses they are given are each rank's share of one global sum, already divided by a
global count.
"""

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from recray.distributed.collectives import sum_over_ranks, world
from recray.train.universal import universal_copy


@runtime_checkable
class Engine(Protocol):
    """What the loop needs of an engine."""

    module: nn.Module

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the gradient of this rank's share of the loss; `last` marks the last micro-batch of a step."""

    def step(self, learning_rate: float) -> float:
        """Clip, update, clear; return the global gradient norm before clipping.

        Where that is not finite, nothing is updated and the gradient is cleared: one NaN sent backward on one rank is
        enough to have the step skipped on all.
        """

    @property
    def device(self) -> torch.device:
        """Where inputs go."""

    def whole_weights(self) -> dict[str, Tensor]:
        """Return every weight whole, on the CPU, tied ones once; a collective, so every rank must call it.

        Where some weights are frozen, as under an adapter, only the trained ones: the others are in the model's folder.
        """

    def save(self, folder: Path, tag: str) -> None:
        """Write what a resumed run needs, of frozen weights nothing; a collective."""

    def load(self, folder: Path, tag: str, *, saved_by: int) -> None:
        """Read it back, on any number of ranks; a collective.

        What it reads may be pickled: the caller has made sure that it is what this run wrote.

        Args:
            folder: Given to `save`.
            tag: Given to `save`.
            saved_by: How many ranks wrote it.
        """


class PlainEngine:
    """AdamW on whole parameters; gradients are summed over ranks."""

    def __init__(self, module: nn.Module, *, weight_decay: float, clip_norm: float) -> None:
        self.module = module
        self._kept = kept_names(module)
        self._clip_norm = clip_norm
        self._optimiser = torch.optim.AdamW(parameter_groups(module, weight_decay), lr=0.0)

    @property
    def device(self) -> torch.device:
        return next(self.module.parameters()).device

    def backward(self, loss: Tensor, *, last: bool) -> None:  # noqa: ARG002 - one rank needs no boundary
        loss.backward()  # type: ignore[no-untyped-call]

    def step(self, learning_rate: float) -> float:
        parameters = [p for p in self.module.parameters() if p.requires_grad]
        if world()[1] > 1:
            for parameter in parameters:
                grad = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
                parameter.grad = sum_over_ranks(grad)
        norm = nn.utils.clip_grad_norm_(parameters, self._clip_norm)
        for group in self._optimiser.param_groups:
            group["lr"] = learning_rate
        if norm.isfinite():
            self._optimiser.step()
        self._optimiser.zero_grad(set_to_none=True)
        return float(norm)

    def whole_weights(self) -> dict[str, Tensor]:
        return _distinct_copies(self.module, self._kept)

    def save(self, folder: Path, tag: str) -> None:
        if world()[0] == 0:
            folder.mkdir(parents=True, exist_ok=True)
            module = {name: tensor for name, tensor in self.module.state_dict().items() if name in self._kept}
            torch.save({"module": module, "optimiser": self._optimiser.state_dict()}, folder / f"{tag}.pt")

    def load(self, folder: Path, tag: str, *, saved_by: int) -> None:  # noqa: ARG002 - it holds everything, whole
        state = torch.load(folder / f"{tag}.pt", weights_only=True)
        missing, unexpected = self.module.load_state_dict(state["module"], strict=False)
        if unexpected or self._kept & set(missing):
            raise RuntimeError(f"{folder} is not of this model: missing {missing}, unexpected {unexpected}")
        self._optimiser.load_state_dict(state["optimiser"])


class DeepSpeedEngine:
    """AdamW under ZeRO 0 to 3.

    Args:
        module: With what is to be trained, and only that, requiring gradient.
        weight_decay: Of matrices.
        clip_norm: Of the global gradient.
        zero_stage: What is sharded: 0 nothing, 1 optimiser state, 2 gradients too, 3 weights too.
        bf16: Whether the weights are bfloat16, with float32 ones in the optimiser.
        zero_settings: More of DeepSpeed's `zero_optimization`.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        weight_decay: float,
        clip_norm: float,
        zero_stage: int,
        bf16: bool = False,
        zero_settings: Mapping[str, Any] | None = None,
    ) -> None:
        deepspeed = _import_deepspeed()
        self._world_size = world()[1]
        self._kept = kept_names(module)
        self._frozen = any(not p.requires_grad for p in module.parameters())
        engine, *_ = deepspeed.initialize(
            model=module,
            model_parameters=parameter_groups(module, weight_decay),
            config={
                "train_micro_batch_size_per_gpu": 1,
                "gradient_accumulation_steps": 1,
                "gradient_clipping": clip_norm,
                "zero_optimization": {"stage": zero_stage, **(zero_settings or {})},
                "zero_allow_untested_optimizer": True,
                "bf16": {"enabled": bf16},
                "optimizer": {"type": "AdamW", "params": {"lr": 0.0, "torch_adam": True}},
                "steps_per_print": 10**9,
            },
        )
        self._engine: Any = engine
        self._stage = zero_stage
        self.module = engine

    @property
    def device(self) -> torch.device:
        device: torch.device = self._engine.device
        return device

    def backward(self, loss: Tensor, *, last: bool) -> None:
        # DeepSpeed averages over ranks, and takes every backward for a whole step unless told where steps end:
        # without the boundary, several backwards before one step are silently wrong at ZeRO 1 and 2.
        self._engine.set_gradient_accumulation_boundary(is_boundary=last)
        self._engine.backward(loss * self._world_size)

    def step(self, learning_rate: float) -> float:
        for group in self._engine.optimizer.param_groups:
            group["lr"] = learning_rate
        if self._stage:  # those skip an update themselves, and then keep the norm of a step before
            self._engine.step()
            return float(self._engine.get_global_grad_norm()) if self._engine.was_step_applied() else math.inf
        # Stage 0 keeps whole gradients, reduced by now, does not say their norm, and takes any of them.
        norm = nn.utils.get_total_norm([p.grad for p in self._engine.module.parameters() if p.grad is not None])
        if norm.isfinite():
            self._engine.step()
        else:
            self._engine.optimizer.zero_grad(set_to_none=True)
        return float(norm)

    def whole_weights(self) -> dict[str, Tensor]:
        inner: nn.Module = self._engine.module
        # The trained ones only: a frozen base need not fit into one process.
        kept = [p for name, p in inner.named_parameters() if name in self._kept]
        with _gathered(kept, stage=self._stage):
            return _distinct_copies(inner, self._kept)

    def save(self, folder: Path, tag: str) -> None:
        # DeepSpeed leaves frozen weights out under the first of their names only: a head tied to the embeddings stays.
        drop = self._engine.module.register_state_dict_post_hook(partial(_drop_others, self._kept))
        try:
            self._engine.save_checkpoint(str(folder), tag=tag, exclude_frozen_parameters=self._frozen)
        finally:
            drop.remove()

    def load(self, folder: Path, tag: str, *, saved_by: int) -> None:
        # Without ZeRO all of it is in one file, whatever the number of ranks.
        if saved_by == self._world_size or self._stage == 0:
            self._engine.load_checkpoint(str(folder), tag=tag, load_module_strict=not self._frozen)
            return
        with universal_copy(folder, tag) as universal, self._own_hyperparameters():
            self._engine._config.load_universal_checkpoint = True
            try:
                self._engine.load_checkpoint(str(universal), tag=tag, load_module_strict=not self._frozen)
            finally:
                self._engine._config.load_universal_checkpoint = False

    @contextmanager
    def _own_hyperparameters(self) -> Iterator[None]:
        """Undo what loading a universal checkpoint at ZeRO-3 does besides, seen in DeepSpeed 0.19.8.

        It gives every group the weight decay of the first, and all of them one step counter, which each update then
        advances as often as there are groups.
        """
        optimiser = self._engine.optimizer
        decays = [group["weight_decay"] for group in optimiser.param_groups]
        yield
        for group, decay in zip(optimiser.param_groups, decays, strict=True):
            group["weight_decay"] = decay
        for state in getattr(optimiser, "optimizer", optimiser).state.values():
            if isinstance(state.get("step"), Tensor):
                state["step"] = state["step"].clone()


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return matrices with weight decay, vectors (norms, biases) without."""
    trained = [p for p in module.parameters() if p.requires_grad]
    matrices, vectors = [p for p in trained if p.ndim >= 2], [p for p in trained if p.ndim < 2]
    groups: list[dict[str, Any]] = [{"params": matrices, "weight_decay": weight_decay}]
    if vectors:
        groups.append({"params": vectors, "weight_decay": 0.0})
    return groups


def kept_names(module: nn.Module) -> frozenset[str]:
    """Return which names of the module's state checkpoints hold: all, or the trained ones where some are frozen."""
    if all(p.requires_grad for p in module.parameters()):
        return frozenset(module.state_dict())
    return frozenset(name for name, p in module.named_parameters() if p.requires_grad)


def make_engine(
    module: nn.Module, *, kind: str, weight_decay: float, clip_norm: float, zero_stage: int
) -> PlainEngine | DeepSpeedEngine:
    """Return the engine of this kind, "plain" or "deepspeed"."""
    if kind == "plain":
        return PlainEngine(module, weight_decay=weight_decay, clip_norm=clip_norm)
    bf16 = next(module.parameters()).dtype == torch.bfloat16
    return DeepSpeedEngine(module, weight_decay=weight_decay, clip_norm=clip_norm, zero_stage=zero_stage, bf16=bf16)


def _import_deepspeed() -> Any:
    """Import DeepSpeed so that it runs without a GPU and without a compiler."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed
    import deepspeed.ops

    # A start on CPUs would compile a shared-memory op that only inference uses, which needs a C++ compiler.
    if deepspeed.__version__.startswith("0.19.") and not torch.cuda.is_available():
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def _drop_others(names: frozenset[str], _module: nn.Module, state: dict[str, Any], _prefix: str, _more: Any) -> None:
    """Remove from a module's state all but these."""
    for name in state.keys() - names:
        del state[name]


@contextmanager
def _gathered(parameters: Sequence[Tensor], *, stage: int) -> Iterator[None]:
    if stage < 3:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(parameters)):
        yield


def _distinct_copies(module: nn.Module, names: frozenset[str]) -> dict[str, Tensor]:
    """Return CPU copies of these of the module's state, a tied weight once, under the first of its names."""
    kept: dict[str, Tensor] = {}
    seen: set[tuple[int, torch.Size]] = set()
    for name, tensor in module.state_dict().items():
        if name not in names:
            continue
        key = (tensor.data_ptr(), tensor.shape)
        if key not in seen:
            seen.add(key)
            kept[name] = tensor.detach().cpu().contiguous().clone()
    return kept
