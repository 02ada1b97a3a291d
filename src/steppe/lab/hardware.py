"""The hardware of a run: one device, or several processes through Lightning Fabric.

Fabric launches the processes (or finds those of ``torchrun`` and of cluster schedulers), picks their devices and wraps
the model in DDP or FSDP2. A single process works without Fabric, whose import takes as long as a short run.
"""

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from steppe.lab.errors import LabError, how_to_install

DEVICES = ("auto", "cpu", "cuda", "mps")
STRATEGIES = ("ddp", "fsdp")
PRECISIONS = ("fp32", "bf16")


@dataclass(frozen=True)
class Hardware:
    """The hardware that a run asks for.

    Raises:
        LabError: a value is none of those that are listed here.
    """

    device: str = "cpu"  # or cuda, mps; auto is the first accelerator that torch finds, else the cpu
    devices: int = 1  # processes on each node, one for each device; torchrun overrides it
    nodes: int = 1  # machines; torchrun overrides it
    strategy: str = "ddp"  # a whole model in each process; or fsdp: parameters sharded by FSDP2
    precision: str = "fp32"  # or bf16, under autocast with parameters in float32

    def __post_init__(self) -> None:
        for name, known in (("device", DEVICES), ("strategy", STRATEGIES), ("precision", PRECISIONS)):
            if getattr(self, name) not in known:
                raise LabError(f"{name} must be one of {', '.join(known)}, not {getattr(self, name)!r}")
        for name in ("devices", "nodes"):
            if getattr(self, name) < 1:
                raise LabError(f"{name} must be a positive integer, not {getattr(self, name)!r}")

    def chosen(self, model: str) -> "Hardware":
        """Return it with ``auto`` decided for a model: the cpu for an MLP, whose steps are too short for another."""
        if self.device != "auto":
            return self
        return replace(self, device="cpu" if model.startswith("mlp") else found()[0])

    def open(self) -> "Process":
        """Launch every process and return this one.

        Raises:
            LabError: the device is missing, or Lightning Fabric is not installed.
        """
        available = found()
        kind = available[0] if self.device == "auto" else self.device
        if kind not in available:
            raise LabError(f"device {kind} is missing: torch {torch.__version__} finds {', '.join(available)} alone")
        local, nodes = self._launched()
        if local * nodes == 1:
            return Process(torch.device(kind), self.precision)
        fabric = _fabric(kind, local, nodes, self.strategy)
        return Process(fabric.device, self.precision, fabric.global_rank, fabric.world_size, fabric)

    def _launched(self) -> tuple[int, int]:
        """Return the processes on each node and the nodes; ``torchrun`` tells them by the environment."""
        if "TORCHELASTIC_RUN_ID" not in os.environ:
            return self.devices, self.nodes
        local = int(os.environ["LOCAL_WORLD_SIZE"])
        return local, int(os.environ["WORLD_SIZE"]) // local


def found() -> list[str]:
    """Return the kinds of devices of this machine, the cpu last."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    return [kind for kind, there in available.items() if there]


def _fabric(kind: str, local: int, nodes: int, strategy: str) -> Any:
    try:
        from lightning_fabric import Fabric
        from lightning_fabric.strategies import ModelParallelStrategy
    except ImportError as error:
        how = how_to_install("distributed")
        raise LabError(f"several processes need Lightning Fabric ({error}); {how}") from None
    sharded = ModelParallelStrategy(_shard, data_parallel_size=local * nodes, tensor_parallel_size=1)
    chosen = "ddp" if strategy == "ddp" else sharded
    fabric = Fabric(accelerator=kind, devices=local, num_nodes=nodes, strategy=chosen)
    fabric.launch()
    return fabric


def _shard(model: nn.Module, mesh: Any) -> nn.Module:
    """Shard each part of a model, so that only one is gathered at a time, then the remaining parameters."""
    from torch.distributed.fsdp import fully_shard

    for part in model.children():
        if any(p.requires_grad for p in part.parameters()):
            fully_shard(part, mesh=mesh["data_parallel"])
    fully_shard(model, mesh=mesh["data_parallel"])
    return model


@dataclass(frozen=True)
class Process:
    """This process, its rank among those that train together, and its device."""

    device: torch.device = torch.device("cpu")
    precision: str = "fp32"
    rank: int = 0
    world: int = 1
    fabric: Any = None

    @property
    def first(self) -> bool:
        """Return whether this is the process that writes and prints."""
        return self.rank == 0

    def setup(self, model: nn.Module) -> nn.Module:
        """Return the model on its device, wrapped by DDP or FSDP2 if there are several processes."""
        wrapped: nn.Module = model.to(self.device) if self.fabric is None else self.fabric.setup_module(model)
        return wrapped

    def autocast(self) -> AbstractContextManager[Any]:
        """Return the context of forward passes."""
        return torch.autocast(self.device.type, torch.bfloat16) if self.precision == "bf16" else nullcontext()

    def share(self, rows: Tensor) -> Tensor:
        """Return this process's part of a batch's rows: every ``world``-th."""
        return rows[self.rank :: self.world]

    def total(self, numbers: Tensor) -> Tensor:
        """Return the sum over all processes."""
        if self.fabric is None:
            return numbers
        summed: Tensor = self.fabric.all_reduce(numbers.to(self.device), reduce_op="sum")
        return summed

    def gather(self, thing: Any) -> list[Any]:
        """Return the ``thing`` of every process, in the order of ranks."""
        everyone = [thing] * self.world
        if self.fabric is not None:
            torch.distributed.all_gather_object(everyone, thing)
        return everyone

    def on_first(self, act: Callable[[], object]) -> None:
        """Call ``act`` in the first process; the others wait until it has returned."""
        if self.first:
            act()
        if self.fabric is not None:
            self.fabric.barrier()

    def synchronise(self) -> None:
        """Wait for the device, so that a clock measures the computation."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def describe(self) -> dict[str, str]:
        """Return what a record says of the hardware; nothing for one process in fp32 on the cpu."""
        if self.device.type == "cpu" and self.world == 1 and self.precision == "fp32":
            return {}
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type
        kind = "" if self.fabric is None else f" ({type(self.fabric.strategy).__name__})"
        return {"device": name, "processes": f"{self.world}{kind}", "precision": self.precision}


CPU, ALONE = Hardware(), Process()  # one process on the cpu
