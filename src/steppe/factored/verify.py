"""The checks, on real data, that the micro-batch gradients of a model factor; the result is a plan."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from steppe.batch import Batch, Batches
from steppe.engine.grads import drop
from steppe.engine.oracle import Oracle
from steppe.engine.passes import Passes
from steppe.engine.replay import RandomState, is_compiled
from steppe.engine.vector import is_sharded, wide
from steppe.factored.black_box import black_boxes
from steppe.factored.collect import TWO_PASSES, collected, relative_cost, weighted_sum
from steppe.factored.gradients import TensorPool
from steppe.factored.layers import LAYERS
from steppe.factored.maps import Lookup
from steppe.factored.microbatches import Layout, MicroBatches, layouts
from steppe.factored.passes import CannotFactor, FirstPass, Mixes, SecondPass, Site, Tracked, Unsure

ByParameter = list[Tensor | None]


@dataclass(frozen=True)
class SharingPlan:
    """The layout of every site, in order, or the reason why there is none.

    Attributes:
        tracked: the perturbed parameters.
        uses: layer, parameters and leading dimensions of every site.
        layouts: which rows belong to which example, for every site.
        reason: why micro-batches cannot share passes; empty where they can.
        final: whether the reason holds for every batch.
        mixes: whether examples of a micro-batch influence one another, so that the plan is of one ``m``.
        pool: the memory of gradients that are held whole.
        cost: the cost of plain SAM in shared passes, relative to that of its two ordinary passes.
    """

    tracked: Tracked
    uses: tuple[Any, ...] = ()
    layouts: tuple[Layout, ...] = ()
    reason: str = ""
    final: bool = True
    mixes: bool = False
    pool: TensorPool = field(default_factory=TensorPool, compare=False)
    cost: float = 1.0

    def apply(self, first: FirstPass) -> None:
        """Give the sites of a pass their layouts.

        Raises:
            CannotFactor: the pass has other sites than the verified one.
        """
        if first.uses() != self.uses:
            raise CannotFactor("the forward pass is not the one that was verified")
        for site, layout in zip(first.sites, self.layouts, strict=True):
            site.layout = layout


def verified(f: Oracle, batch: Batch, parts: MicroBatches | None = None) -> SharingPlan:
    """Return the plan for the model, data shape and perturbed parameters of this batch.

    Weights, gradients, buffers and random streams are restored. State of the model that is not in a buffer sees the
    additional passes.
    """
    tracked = Tracked.of(f, batch)
    before = RandomState.now(f.passes.parameters.devices)
    try:
        _check_supported(batch, f)
        with f.passes.ranks.apart(), _noise_added(batch.model), _NoDropout():
            return _Verification(f, batch, parts).plan(tracked)
    except CannotFactor as error:
        return SharingPlan(tracked, reason=str(error), final=error.final, mixes=isinstance(error, Mixes))
    except Exception as error:  # the model itself fails: the loop will raise the same error
        return SharingPlan(tracked, reason=described(error), final=False)
    finally:
        before.restore()


class _Verification:
    """The passes that verify a model; none of them counts as one of the step's."""

    def __init__(self, f: Oracle, batch: Batch, parts: MicroBatches | None) -> None:
        self.f, self.batch, self.n, self.parts = f, batch, len(batch), parts
        self.passes = Passes(batch, f.passes.parameters)
        self.scale = float(batch.loss_scale(f.passes.parameters.tensors[0].detach()))  # of every loss in these passes

    def plan(self, tracked: Tracked) -> SharingPlan:
        """Run a first pass, find its layouts, and check all that follows from them."""
        for _ in range(3):
            first = FirstPass(tracked, LAYERS, self.parts)
            losses, g, weights = self.two_backwards(first)
            if not first.sites:
                raise CannotFactor("no perturbed parameter takes part in the loss")
            deltas = [d for site in first.sites for d in site.deltas]
            low = any(wide(d) is not d for d in deltas)
            tf32 = any(d.device.type != "cpu" for d in deltas)  # products may be rounded to 10 bits
            found = [_layout(site, weights, first, 0.3 if low else 1e-3) for site in first.sites]
            misfits = {i for i, (_, fits) in enumerate(found) if not fits and _may_be_unbatched(first.sites[i])}
            if not misfits - tracked.unbatched:
                break
            tracked = replace(tracked, unbatched=tracked.unbatched | misfits)  # repeat positions for every example
        plan = SharingPlan(tracked, first.uses(), tuple(layout for layout, _ in found), mixes=first.mixes)
        for site, (_, fits) in zip(first.sites, found, strict=True):
            if not fits:
                raise CannotFactor(f"examples influence one another at {first.label(site)}")
        for site in first.sites:
            del site.deltas[1:]
        first.check()
        plan.apply(first)
        self.check_losses_of_parts(first, losses, 5e-2 if low else 1e-2 if tf32 else 1e-3)
        self.check_part(first, self.n, g, 0.3 if low else 3e-2 if tf32 else 1e-3)
        m = max(1, self.n // 2) if self.parts is None or not first.mixes else min(self.parts.m, self.n)
        self.check_part(first, m, None, 0.3 if low else 5e-2)
        self.check_second_pass(first, MicroBatches(self.n, m), g, 0.5 if low else 5e-2)
        return replace(plan, cost=relative_cost(first))

    def two_backwards(self, first: FirstPass) -> tuple[Tensor, ByParameter, Tensor]:
        """Run one forward, and the backward of the mean and of a sum whose random weights tell examples apart.

        Returns:
            The losses, the gradient of their mean, and the weights.
        """
        with self.passes.one(away=True):
            with black_boxes(self.batch.model, first):
                losses = self.batch.losses()
            if not losses.isfinite().all():
                raise Unsure("the losses of this batch are not finite")
            random = torch.Generator().manual_seed(0)
            parts = self.parts if self.parts is not None and first.mixes else MicroBatches(self.n, 1)
            order = torch.randperm(parts.k, generator=random)
            weights = parts.spread(2.0 ** (order % 5 - 4)).to(losses)  # powers of two commute with rounding, TF32's too
            g = self.first_backward(losses, first)
            (losses @ weights * (self.scale / self.n)).backward()
        return losses.detach(), g, weights

    def first_backward(self, losses: Tensor, first: FirstPass) -> ByParameter:
        """Return the gradient of the mean, at a loss scale that keeps it well within float16."""
        while True:
            (losses.sum() * (self.scale / self.n)).backward(retain_graph=True)
            g = self.gradients()
            if self.scale == 1 or all(float(t.abs().max()) < 1e3 for t in g if t is not None and t.numel()):
                return g
            self.scale = max(1.0, self.scale / 64)
            drop(self.f.passes.parameters.tensors)
            for site in first.sites:
                site.deltas.clear()

    def gradients(self) -> ByParameter:
        """Return copies of the gradients that backward has left."""
        return [None if p.grad is None else p.grad.detach().clone() for p in self.f.passes.parameters.tensors]

    def check_losses_of_parts(self, first: FirstPass, losses: Tensor, tolerance: float) -> None:
        """Raise unless every example has the same loss in a smaller batch."""
        if self.n == 1:
            return
        cut = max(1, self.n // 3)
        cuts = [(0, cut), (cut, self.n)]
        if self.parts is not None and first.mixes:
            cuts = [(a, min(a + self.parts.m, self.n)) for a in range(0, self.n, self.parts.m)]
        with self.passes.one(away=True), torch.no_grad():
            halves = [self.batch.subset(torch.arange(a, b)).losses() for a, b in cuts]
        if not (torch.cat(halves) - losses).abs().max() <= tolerance * (losses.abs().max() + 1e-6):
            raise CannotFactor("the loss of an example depends on the other examples of its batch, or on chance")

    def check_part(self, first: FirstPass, m: int, g: ByParameter | None, tolerance: float) -> None:
        """Raise unless the factors of the first ``m`` examples add up to ``g``, or without it to their own gradient."""
        if g is None:
            with self.passes.one(away=True):
                (self.batch.split(m)[0].losses().sum() * (self.scale / self.n)).backward()
                g = self.gradients()
        c = (torch.arange(self.n) < m).to(first.sites[0].deltas[0])
        _check_close(weighted_sum(first, c, self.f.passes.parameters.tensors), g, first.tracked, tolerance)

    def check_second_pass(self, first: FirstPass, parts: MicroBatches, g: ByParameter, tolerance: float) -> None:
        """Raise unless the second pass with ``eps = 0`` gives the gradients of the first."""
        with torch.no_grad():
            matrices, small = collected(first, parts, TWO_PASSES)
        zero = torch.zeros(parts.k, device=first.sites[0].deltas[0].device)
        scaled = {i: (gradient, zero) for i, gradient in matrices.items()}
        eps = {i: torch.zeros_like(t) for i, t in small.items()}
        second = SecondPass(first.tracked, LAYERS, first.sites, parts, scaled, eps)
        with self.passes.one(away=True):
            with black_boxes(self.batch.model, second):
                losses = self.batch.losses()
            (losses.sum() * (self.scale / self.n)).backward()
            _check_close(self.gradients(), g, first.tracked, tolerance)


def _may_be_unbatched(site: Site) -> bool:
    return isinstance(site.map, Lookup) and (len(site.leading) == 1 or site.leading[0] == 1)


def _layout(site: Site, weights: Tensor, first: FirstPass, tolerance: float) -> tuple[Layout, bool]:
    """Return the layout that best explains the second backward as the first times weights, and whether it fits."""
    if len(site.deltas) != 2:
        raise CannotFactor(f"{first.label(site)} has no gradient in this pass, or several")
    a, b = (wide(d.reshape(-1, *d.shape[len(site.leading) :])).flatten(1) for d in site.deltas)
    if not a.norm() > 0 or not a.isfinite().all():
        raise Unsure(f"the gradient at {first.label(site)} is zero or not finite for this batch")
    errors = {}
    if site.parts is not None:
        weights = weights[site.parts.starts]
    for layout in layouts(len(weights), site.leading):
        w = wide(weights)[layout.example_of_row(len(a), a.device), None]
        errors[layout] = float((b - w * a).norm() / b.norm())
    if not errors:
        return Layout(1, 1), False
    best = min(errors, key=lambda layout: errors[layout])
    return best, errors[best] < tolerance


def _check_close(ours: ByParameter, expected: ByParameter, tracked: Tracked, tolerance: float) -> None:
    # In low precision two orders of summation differ by some percent, and between two forwards a ReLU may flip.
    total = sum(float(wide(t).norm()) ** 2 for t in expected if t is not None) ** 0.5
    for i, name in tracked.names.items():
        a, b = ours[i], expected[i]
        if (a is None) != (b is None):
            raise CannotFactor(f"{name} takes part in a way that was not recorded")
        if a is not None and b is not None:
            error = float((wide(a) - wide(b)).norm())
            if not error <= tolerance * (float(wide(b).norm()) + 1e-2 * total):
                raise CannotFactor(f"the factors of {name} do not add up to its gradient")


def _check_supported(batch: Batch, f: Oracle) -> None:
    parameters = f.passes.parameters.tensors
    if isinstance(batch, Batches):
        raise CannotFactor("the batch is accumulated: the factors of one batch are held at a time")
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    for module in batch.modules():
        if isinstance(module, nn.SyncBatchNorm) and module.training and distributed:
            raise CannotFactor("SyncBatchNorm averages statistics over the processes")
        if module._backward_hooks or module._backward_pre_hooks:
            raise CannotFactor(f"{type(module).__name__} has backward hooks")
        if is_compiled(module):
            raise CannotFactor("the model is compiled")
    if any(map(is_sharded, batch.model.parameters())):
        raise CannotFactor("parameters are sharded")
    if len({p.device for p in parameters}) > 1:
        raise CannotFactor("parameters are on several devices")
    if any(map(has_hooks, parameters)):
        raise CannotFactor("parameters have gradient hooks")


def described(error: Exception) -> str:
    """Return an error as one line of the log."""
    return f"{type(error).__name__}: {error}"


def has_hooks(p: Tensor) -> bool:
    """Return whether a hook may change or use the gradient of a parameter."""
    return bool(p._backward_hooks or getattr(p, "_post_accumulate_grad_hooks", None))


_DROPOUTS = {F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout, torch.dropout}


class _NoDropout(TorchFunctionMode):
    """Turns dropout off, so that a part of the batch can be compared with the whole."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func in _DROPOUTS:
            return args[0] if args else kwargs["input"]
        if func is F.scaled_dot_product_attention:
            args = (*args[:4], 0.0, *args[5:]) if len(args) > 4 else args
            kwargs |= {"dropout_p": 0.0} if "dropout_p" in kwargs else {}
        return func(*args, **kwargs)


@contextmanager
def _noise_added(model: nn.Module) -> Iterator[None]:
    """Add a little noise to every parameter, and restore it bit for bit: a weight of zero hides what comes before."""
    parameters: list[Tensor] = [p for p in model.parameters() if p.is_floating_point()]
    saved = [p.detach().clone() for p in parameters]
    try:
        with torch.no_grad():
            for seed, p in enumerate(parameters):
                random = torch.Generator(device=p.device).manual_seed(seed)
                size = p.float().square().mean().sqrt() * 0.05 + 0.01
                p.add_((torch.randn(p.shape, generator=random, device=p.device) * size).to(p.dtype))
        yield
    finally:
        if parameters:
            with torch.no_grad():
                torch._foreach_copy_(parameters, saved)
