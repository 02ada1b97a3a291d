"""A stand-in for CUDA devices: tensors that say ``cuda`` and compute, real numbers, on the CPU.

What a device would refuse is refused: operands on several devices. What would make the host wait for it is counted:
``Accelerator.waits``. To autograd the tensors are the CPU's, so that one thread runs everything.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

aten = torch.ops.aten
COPIES = {aten._to_copy, aten.copy_}  # between devices
READS = {aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.equal, aten._unique2}
HERE = torch.device("cpu")  # what autograd says of a device that it takes for the CPU; who means it says cpu:0
PRODUCTS = {aten.mm, aten.bmm, aten.addmm, aten.baddbmm}
CONVOLUTIONS = {aten.convolution, aten.convolution_backward}


class OnDevice(Tensor):
    """A tensor on a device that is not there; ``inner`` is on the CPU."""

    inner: Tensor
    _device: torch.device

    @staticmethod
    def __new__(cls, inner: Tensor, device: torch.device) -> OnDevice:
        layout = {"strides": inner.stride(), "storage_offset": inner.storage_offset(), "dtype": inner.dtype}
        made = Tensor._make_wrapper_subclass(cls, inner.shape, **layout, device="cpu")
        made.inner, made._device = inner, device
        return made

    device = property(lambda self: self._device)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)

    def __repr__(self, **_: Any) -> str:
        return f"OnDevice({self.inner!r}, {self._device})"

    def tolist(self) -> Any:
        """Values."""
        return self.cpu().tolist()

    def cpu(self, *_: Any, **__: Any) -> Tensor:
        """A copy on the CPU."""
        return self.to("cpu")

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            return _to(*args, **kwargs) if func is Tensor.to else func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(f"{func} outside of the accelerator")


class Accelerator(TorchDispatchMode):
    """Inside, ``device="cuda"`` works.

    Attributes:
        waits: what made the host wait for the device, by operation: values read, and copies to and fro that are not
            ``non_blocking``.
        strays: operations that made a tensor of some size on the CPU.
        capturing: whether a CUDA graph is: then waits are errors.
        tf32: which of "products" and "convolutions" round operands in float32 to TF32's ten bits.
    """

    def __init__(self, tf32: tuple[str, ...] = ()) -> None:
        super().__init__()
        self.waits: list[str] = []
        self.strays: list[str] = []
        self.capturing, self.tf32 = False, tf32
        self.generators: dict[int, torch.Generator] = {}
        self._patches = ExitStack()

    # ---- what is patched

    def __enter__(self) -> Accelerator:
        self._patches = ExitStack()
        for target, name, value in (
            (torch.cuda, "_lazy_init", lambda: None),
            (torch.cuda, "is_available", lambda: True),
            (torch.cuda, "get_rng_state", lambda device="cuda": self.random(device).get_state()),
            (torch.cuda, "set_rng_state", lambda state, device="cuda": self.random(device).set_state(state)),
            (torch.cuda, "is_current_stream_capturing", lambda: self.capturing),
            (torch, "Generator", _Generator),
            (torch, "tensor", _made(torch.tensor)),
            (torch, "as_tensor", _made(torch.as_tensor)),
        ):
            self._patches.enter_context(patch.object(target, name, value))
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._patches.close()

    @staticmethod
    def move(model: nn.Module, device: str = "cuda:0") -> nn.Module:
        """``model.to(device)``, with new parameters."""
        for module in model.modules():
            for name, p in module._parameters.items():
                if p is not None:
                    module._parameters[name] = nn.Parameter(p.detach().to(device), p.requires_grad)
            module._buffers.update({name: b.to(device) for name, b in module._buffers.items() if b is not None})
        return model

    def random(self, device: torch.device | str) -> torch.Generator:
        """A device's default generator."""
        index = torch.device(device).index or 0
        return self.generators.setdefault(index, torch.Generator().manual_seed(index))

    # ---- operations

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func.__name__.startswith("_foreach_"):
            return self._each(func, args, kwargs)
        operands = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        device = self._place(func, args, kwargs, operands)
        self._count(func, args, kwargs, operands, device)
        if kwargs.get("device") is not None:
            kwargs["device"] = torch.device("cpu")
        with self._random(func, kwargs, device):
            inner = (tree_map(_inner, args), tree_map(_inner, kwargs))
            if self._rounds(func):
                inner = tree_map(_tf32, inner[0]), inner[1]  # not `out`
            out = func(*inner[0], **inner[1])
        if device is None:
            self.strays += [str(func)] * any(t.dim() and t.numel() for t in tree_leaves(out) if isinstance(t, Tensor))
            return out
        made = tree_map(lambda t: OnDevice(t, device) if isinstance(t, Tensor) else t, out)
        if any(isinstance(t, OnDevice) for t in operands):
            return return_and_correct_aliasing(func, args, kwargs, made)
        return made

    def _each(self, func: Any, args: Any, kwargs: Any) -> Any:
        """An operation on lists of tensors, which may lie on several devices, row by row."""
        rows = list(zip(*(a for a in args if isinstance(a, list | tuple)), strict=True))
        for row in rows:
            self._place(func, row, {}, [t for t in row if isinstance(t, Tensor)])
        out = func(*tree_map(_inner, args), **tree_map(_inner, kwargs))
        if out is None:
            return None
        return [
            OnDevice(t, row[0]._device) if isinstance(row[0], OnDevice) else t for t, row in zip(out, rows, strict=True)
        ]

    def _place(self, func: Any, args: Any, kwargs: Any, operands: list[Tensor]) -> torch.device | None:
        """Where the result is: ``None`` is the CPU."""
        if func.overloadpacket is aten.copy_:
            return getattr(args[0], "_device", None)
        devices = {t._device for t in operands if isinstance(t, OnDevice)}
        device = kwargs.get("device")
        if device is not None and not (devices and device == HERE):
            return None if torch.device(device).type == "cpu" else _numbered(device)
        if not devices:
            return None
        others = [t for t in operands if not isinstance(t, OnDevice)]
        if func.overloadpacket in (aten.index, aten.index_put_, aten._index_put_impl_):
            others = []  # indices may be the CPU's
        pointwise = torch.Tag.pointwise in func.tags
        if len(devices) > 1 or any(t.dim() or not pointwise for t in others):
            found = ", ".join(f"{tuple(t.shape)} on {t.device}" for t in operands)
            raise RuntimeError(f"Expected all tensors to be on the same device, {func} has {found}")
        return devices.pop()

    def _count(self, func: Any, args: Any, kwargs: Any, operands: list[Tensor], device: torch.device | None) -> None:
        packet, there = func.overloadpacket, [isinstance(t, OnDevice) for t in operands]
        indices = [t for t in tree_leaves(args[1]) if t is not None] if packet is aten.index else []
        if (
            (packet in READS and any(there))
            or (packet is aten._to_copy and there[0] != (device is not None) and not kwargs.get("non_blocking"))
            or (packet is aten.copy_ and there[0] != there[1] and not (args[2:] and args[2]))
            or (any(there) and any(t.dtype == torch.bool or not isinstance(t, OnDevice) for t in indices))
        ):
            if self.capturing:
                raise RuntimeError(f"{func}: operation not permitted when stream is capturing")
            self.waits.append(str(func))

    @contextmanager
    def _random(self, func: Any, kwargs: dict[str, Any], device: torch.device | None) -> Iterator[None]:
        """On a device without a generator of their own, numbers are drawn from the device's."""
        if device is None or torch.Tag.nondeterministic_seeded not in func.tags or kwargs.get("generator") is not None:
            yield
            return
        mine, cpu = self.random(device), torch.default_generator
        before = cpu.get_state()
        cpu.set_state(mine.get_state())
        try:
            yield
        finally:
            mine.set_state(cpu.get_state())
            cpu.set_state(before)

    def _rounds(self, func: Any) -> bool:
        kinds = {"products": PRODUCTS, "convolutions": CONVOLUTIONS}
        return any(func.overloadpacket in kinds[kind] for kind in self.tf32)


def _inner(t: Any) -> Any:
    return t.inner if isinstance(t, OnDevice) else t


def _tf32(t: Any) -> Any:
    """Ten bits of mantissa, to nearest."""
    if not isinstance(t, Tensor) or t.dtype != torch.float32:
        return t
    bits = t.contiguous().view(torch.int32)
    return ((bits + 0x1000) & ~0x1FFF).view(torch.float32)


class _Generator(torch.Generator):
    """Of any device, the CPU's."""

    def __new__(cls, device: Any = "cpu") -> Any:
        return super().__new__(cls)


def _made(real: Any) -> Any:
    """From values of the host: they are copied to the device."""

    def make(data: Any, *, dtype: torch.dtype | None = None, device: Any = None, **options: Any) -> Tensor:
        made: Tensor = real(data, dtype=dtype, **options)
        return made if device is None else made.to(_numbered(device))

    return make


def _numbered(device: torch.device | str) -> torch.device:
    device = torch.device(device)
    return torch.device(device.type, device.index or 0)


def _to(t: Tensor, *args: Any, non_blocking: bool = False, copy: bool = False, **kwargs: Any) -> Tensor:
    """``Tensor.to``, which would ask where torch thinks that the tensor is."""
    device, dtype = kwargs.get("device", t.device), kwargs.get("dtype", t.dtype)
    for a in args:
        if isinstance(a, Tensor):
            device, dtype = a.device, a.dtype
        elif isinstance(a, torch.dtype):
            dtype = a
        else:
            device = a
    if (_numbered(device), dtype) == (t.device, t.dtype) and not copy:
        return t
    made: Tensor = _Copied.apply(t, _numbered(device), dtype, non_blocking)  # type: ignore[no-untyped-call]
    return made


class _Copied(torch.autograd.Function):
    """A copy elsewhere, whose gradient comes back: autograd itself would not find the way."""

    @staticmethod
    def forward(ctx: Any, t: Tensor, device: torch.device, dtype: torch.dtype, non_blocking: bool) -> Tensor:
        ctx.device, ctx.dtype = t.device, t.dtype
        made: Tensor = aten._to_copy(t, dtype=dtype, device=device, non_blocking=non_blocking)
        return made

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return _to(grad, ctx.device, ctx.dtype), None, None, None
