"""The process group of a group of workers, over the network on which their nodes know each other."""

import os
from dataclasses import dataclass
from typing import Any

import psutil
import ray
from ray.train.torch import TorchConfig
from ray.train.torch.config import _TorchBackend

INTERFACE = "GLOO_SOCKET_IFNAME"


class NodesBackend(_TorchBackend):  # type: ignore[misc]  # ray.train is untyped
    """PyTorch's process group of workers on several nodes.

    Gloo listens at the address that a node's name has there, which on many is 127.0.0.1 or 127.0.1.1: no other node
    reaches it. Ray knows an address that all reach.
    """

    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        """Choose the network on every worker, then set up the process group."""
        worker_group.execute(use_node_address)
        super().on_start(worker_group, backend_config)


@dataclass
class NodesTorch(TorchConfig):  # type: ignore[misc]
    """What workers' collectives run on."""

    @property
    def backend_cls(self) -> type[NodesBackend]:
        """The class that sets workers up."""
        return NodesBackend


def use_node_address() -> None:
    """Have Gloo use the interface with this node's address, unless the environment names one."""
    name = interface_of(ray.util.get_node_ip_address())
    if name is not None:
        os.environ.setdefault(INTERFACE, name)


def interface_of(address: str) -> str | None:
    """Return the network interface with this address, None where none has it."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(each.address.partition("%")[0] == address for each in addresses):
            return str(name)
    return None
