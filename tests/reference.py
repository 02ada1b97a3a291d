"""Independent reference of the sharpness-aware methods, written from their formulas alone.

Everything lives on one flat float64 vector ``w``. A :class:`Problem` answers the per-example losses and gradients at
any ``w``; a method turns them into the gradient ``u`` fed to a base optimiser and the vector ``beside`` that bypasses
it; and :func:`trajectory` runs a method over steps. Nothing here is fast: every gradient is per example, and
micro-batches slice the gradients of the whole batch.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

TINY = 1e-12  # added to every norm that divides
Memory = dict[str, Tensor]


# ---------------------------------------------------------------------------------------------------------------- world


@dataclass
class Problem:
    """What a method can ask of the world, at any flat ``w``."""

    n: int  # examples in the batch
    losses: Callable[[Tensor], Tensor]  # w -> (n,)
    grads: Callable[[Tensor], Tensor]  # w -> (n, d)
    sizes: list[int]  # how the flat vector splits into tensors
    weight_like: list[bool]  # whether the tensor has two dimensions or more
    full: Problem | None = None  # the larger batch of n-SAM

    def grad(self, w: Tensor) -> Tensor:
        """Gradient of the mean loss."""
        return self.grads(w).mean(0)

    def part(self, start: int, stop: int) -> Problem:
        """The examples ``start..stop-1`` as a batch of their own."""
        return Problem(
            n=stop - start,
            losses=lambda w: self.losses(w)[start:stop],
            grads=lambda w: self.grads(w)[start:stop],
            sizes=self.sizes,
            weight_like=self.weight_like,
            full=self.full,
        )

    def spread(self, values: Sequence[float]) -> Tensor:
        """One value per tensor, repeated over that tensor's coordinates."""
        per_tensor = torch.tensor([float(v) for v in values], dtype=torch.float64)
        return per_tensor.repeat_interleave(torch.tensor(self.sizes))

    @classmethod
    def from_module(
        cls,
        model: nn.Module,
        loss: Callable[[Tensor, Tensor], Tensor],
        data: tuple[Tensor, Tensor],
        full: tuple[Tensor, Tensor] | None = None,
    ) -> Problem:
        """Problem of ``loss(model(x), y)``, ``data = (x, y)`` with examples along the first dimension.

        Each example goes alone through a float64 copy of the model, as a batch of one (so no batch norm in train mode);
        ``loss`` may reduce by mean or not at all. Only parameters that require a gradient enter ``w``, in the order of
        ``model.parameters()``, a tied one once.
        """
        model = copy.deepcopy(model).double()
        named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        sizes = [p.numel() for p in named.values()]
        x, y = (v.double() if v.is_floating_point() else v for v in data)

        def one(w: Tensor, i: int) -> Tensor:
            pieces = w.split(sizes)
            values = {k: piece.view(p.shape) for (k, p), piece in zip(named.items(), pieces, strict=True)}
            return loss(functional_call(model, values, (x[i : i + 1],)), y[i : i + 1]).mean()

        def losses(w: Tensor) -> Tensor:
            with torch.no_grad():
                return torch.stack([one(w, i) for i in range(len(x))])

        def grads(w: Tensor) -> Tensor:
            with torch.enable_grad():
                w = w.detach().clone().requires_grad_()
                return torch.stack([torch.autograd.grad(one(w, i), w)[0] for i in range(len(x))])

        return cls(
            n=len(x),
            losses=losses,
            grads=grads,
            sizes=sizes,
            weight_like=[p.dim() >= 2 for p in named.values()],
            full=None if full is None else cls.from_module(model, loss, full),
        )


def flat(model: nn.Module) -> Tensor:
    """The ``w`` at which :meth:`Problem.from_module` finds the model now."""
    return torch.cat([p.detach().double().reshape(-1) for p in model.parameters() if p.requires_grad])


def quadratic(
    A: Sequence[Any],
    b: Sequence[Any],
    sizes: list[int] | None = None,
    weight_like: list[bool] | None = None,
    full: Problem | None = None,
) -> Problem:
    """Problem of ``f_i = 0.5 w^T A_i w + b_i^T w``; by default one tensor that does not count as a weight."""
    As = torch.stack([torch.as_tensor(a, dtype=torch.float64) for a in A])
    As = (As + As.mT) / 2  # the gradient below needs symmetry; the value does not change
    bs = torch.stack([torch.as_tensor(v, dtype=torch.float64) for v in b])
    sizes = [bs.shape[1]] if sizes is None else sizes
    return Problem(
        n=len(As),
        losses=lambda w: 0.5 * (As @ w) @ w + bs @ w,
        grads=lambda w: As @ w + bs,
        sizes=sizes,
        weight_like=[False] * len(sizes) if weight_like is None else weight_like,
        full=full,
    )


# -------------------------------------------------------------------------------------------------------------- methods


class Step(NamedTuple):
    """What a method answers: gradient for the base, vector that bypasses it, what it remembers."""

    u: Tensor
    beside: Tensor
    memory: Memory


class Radius:
    """ρ, the same for all or one per tensor; a tensor of radius 0 takes no part in the ascent direction."""

    def __init__(self, problem: Problem, rho: float | None, rho_of: Sequence[float] | None) -> None:
        if (rho is None) == (rho_of is None):
            raise ValueError("give exactly one of rho and rho_of")
        self.each = problem.spread([rho] * len(problem.sizes) if rho_of is None else rho_of)
        self.mask = (self.each > 0).double()

    def along(self, d: Tensor, norm: Tensor | None = None) -> Tensor:
        """ε = ρ d / ‖d‖, or over another norm."""
        d = self.mask * d
        norm = d.norm() if norm is None else norm
        return self.each * d / (norm + TINY)


def only(u: Tensor, memory: Memory | None = None) -> Step:
    """A step without a part beside the base."""
    return Step(u, torch.zeros_like(u), {} if memory is None else memory)


def project(a: Tensor, b: Tensor) -> Tensor:
    """Component of ``a`` along ``b``, zero for a zero ``b``."""
    square = b.dot(b)
    return torch.zeros_like(a) if square == 0 else a.dot(b) / square * b


def plain(p: Problem, w: Tensor, memory: Memory, t: int) -> Step:
    """The base optimiser alone."""
    return only(p.grad(w))


def sam(p: Problem, w: Tensor, memory: Memory, t: int, *, rho=None, rho_of=None) -> Step:
    eps = Radius(p, rho, rho_of).along(p.grad(w))
    return only(p.grad(w + eps))


def usam(p: Problem, w: Tensor, memory: Memory, t: int, *, rho=None, rho_of=None) -> Step:
    eps = Radius(p, rho, rho_of).each * p.grad(w)
    return only(p.grad(w + eps))


def unified_sam(p: Problem, w: Tensor, memory: Memory, t: int, *, lam: float, rho=None, rho_of=None) -> Step:
    radius, g = Radius(p, rho, rho_of), p.grad(w)
    eps = (1 - lam) * radius.each * g + lam * radius.along(g)
    return only(p.grad(w + eps))


def nsam(p: Problem, w: Tensor, memory: Memory, t: int, *, rho=None, rho_of=None) -> Step:
    if p.full is None:
        raise ValueError("n-SAM needs problem.full")
    eps = Radius(p, rho, rho_of).along(p.full.grad(w))
    return only(p.grad(w + eps))


def scaled_sam(p: Problem, w: Tensor, T: Tensor, radius: Radius) -> Step:
    """ε = ρ T²g / ‖Tg‖ for a diagonal T."""
    g = p.grad(w)
    eps = radius.along(T * T * g, norm=(radius.mask * T * g).norm())
    return only(p.grad(w + eps))


def asam(p: Problem, w: Tensor, memory: Memory, t: int, *, eta: float, rho=None, rho_of=None) -> Step:
    """T = |w| + η on tensors of two dimensions or more, 1 on the rest."""
    T = torch.where(p.spread(p.weight_like) > 0, w.abs() + eta, torch.ones_like(w))
    return scaled_sam(p, w, T, Radius(p, rho, rho_of))


def asam_all(p: Problem, w: Tensor, memory: Memory, t: int, *, eta: float, rho=None, rho_of=None) -> Step:
    """T = |w| + η on every tensor."""
    return scaled_sam(p, w, w.abs() + eta, Radius(p, rho, rho_of))


def fisher_sam(p: Problem, w: Tensor, memory: Memory, t: int, *, eta: float, rho=None, rho_of=None) -> Step:
    """ε = ρ F⁻¹g / sqrt(gᵀF⁻¹g), F = diag(1 + η g²) with g the batch gradient."""
    radius, g = Radius(p, rho, rho_of), p.grad(w)
    d = g / (1 + eta * g * g)
    eps = radius.along(d, norm=(radius.mask * g).dot(d).sqrt())
    return only(p.grad(w + eps))


def gsam(p: Problem, w: Tensor, memory: Memory, t: int, *, alpha: float, rho=None, rho_of=None) -> Step:
    g = p.grad(w)
    h = p.grad(w + Radius(p, rho, rho_of).along(g))
    return only(h - alpha * (g - project(g, h)))


def wsam(p: Problem, w: Tensor, memory: Memory, t: int, *, gamma: float, rho=None, rho_of=None) -> Step:
    """Decoupled: the base sees g alone, κ(h − g) bypasses it."""
    g = p.grad(w)
    h = p.grad(w + Radius(p, rho, rho_of).along(g))
    return Step(g, gamma / (1 - gamma) * (h - g), {})


def coupled_wsam(p: Problem, w: Tensor, memory: Memory, t: int, *, gamma: float, rho=None, rho_of=None) -> Step:
    g = p.grad(w)
    h = p.grad(w + Radius(p, rho, rho_of).along(g))
    kappa = gamma / (1 - gamma)
    return only(kappa * h + (1 - kappa) * g)


def weighted_sam(p: Problem, w: Tensor, norms: Tensor, lam: float, radius: Radius) -> Step:
    """RW-SAM once the norms are known: p_i ∝ exp(λ n_i) weighs the perturbation, not the second gradient."""
    eps = radius.along(sharpness_weights(norms, lam) @ p.grads(w))
    return only(p.grad(w + eps))


def sharpness_weights(norms: Tensor, lam: float) -> Tensor:
    return torch.softmax(lam * norms, 0)


def rwsam(p: Problem, w: Tensor, memory: Memory, t: int, *, lam: float, rho=None, rho_of=None) -> Step:
    """Exact norms, over the coordinates that can be perturbed."""
    radius = Radius(p, rho, rho_of)
    norms = (radius.mask * p.grads(w)).norm(dim=1)
    return weighted_sam(p, w, norms, lam, radius)


def rwsam_probe(
    p: Problem, w: Tensor, memory: Memory, t: int, *, lam: float, z: Tensor, delta: float, rho=None, rho_of=None
) -> Step:
    """Norms guessed from one finite difference along ``z``, zeroed on the coordinates that cannot be perturbed."""
    radius = Radius(p, rho, rho_of)
    probe = delta * radius.mask * z.double()
    norms = (p.losses(w + probe) - p.losses(w)).abs() / delta
    return weighted_sam(p, w, norms, lam, radius)


def esam(
    p: Problem,
    w: Tensor,
    memory: Memory,
    t: int,
    *,
    gamma: float = 1.0,
    beta: float = 1.0,
    kept: Sequence[float] | None = None,
    rho=None,
    rho_of=None,
) -> Step:
    """Ascent in the ``kept`` tensors over β; descent on the examples whose loss rises most."""
    mask = torch.ones_like(w) if kept is None else p.spread(kept)
    eps = Radius(p, rho, rho_of).along(mask * p.grad(w)) / beta
    if gamma >= 1:
        return only(p.grad(w + eps))
    rise = p.losses(w + eps) - p.losses(w)
    chosen = rise.topk(max(1, int(gamma * p.n))).indices
    return only(p.grads(w + eps)[chosen].mean(0))


def looksam(p: Problem, w: Tensor, memory: Memory, t: int, *, k: int, alpha: float, rho=None, rho_of=None) -> Step:
    g = p.grad(w)
    if t % k == 0:
        h = p.grad(w + Radius(p, rho, rho_of).along(g))
        return only(h, {"g_v": h - project(h, g)})
    g_v = memory["g_v"]
    return only(g + alpha * g.norm() / (g_v.norm() + TINY) * g_v, memory)


def fsam(p: Problem, w: Tensor, memory: Memory, t: int, *, sigma: float, decay: float, rho=None, rho_of=None) -> Step:
    """The direction uses the mean as it was before this step's gradient entered it."""
    g = p.grad(w)
    if "m" in memory:
        d, mean = g - sigma * memory["m"], decay * memory["m"] + (1 - decay) * g
    else:
        d, mean = g, g
    return only(p.grad(w + Radius(p, rho, rho_of).along(d)), {"m": mean})


def vasso(p: Problem, w: Tensor, memory: Memory, t: int, *, theta: float, rho=None, rho_of=None) -> Step:
    g = p.grad(w)
    d = (1 - theta) * memory["d"] + theta * g if "d" in memory else g
    return only(p.grad(w + Radius(p, rho, rho_of).along(d)), {"d": d})


METHODS: dict[str, Callable[..., Step]] = {
    "Plain": plain,
    "SAM": sam,
    "USAM": usam,
    "UnifiedSAM": unified_sam,
    "NSAM": nsam,
    "ASAM": asam,
    "ASAMAll": asam_all,
    "FisherSAM": fisher_sam,
    "GSAM": gsam,
    "WSAM": wsam,
    "CoupledWSAM": coupled_wsam,
    "RWSAM": rwsam,
    "RWSAMProbe": rwsam_probe,
    "ESAM": esam,
    "LookSAM": looksam,
    "FSAM": fsam,
    "VaSSO": vasso,
}


def direction(
    name: str, problem: Problem, w: Tensor, memory: Memory, t: int, m: int | None = None, **hyper: Any
) -> Step:
    """One step of a method, over micro-batches of ``m`` in order if given: the size-weighted mean of their answers."""
    method = METHODS[name]
    between = name == "LookSAM" and t % hyper["k"] != 0  # no ascent, so no micro-batches
    if m is None or between:
        return method(problem, w, memory, t, **hyper)
    u, beside, remembered = torch.zeros_like(w), torch.zeros_like(w), {}
    for start in range(0, problem.n, m):
        part = problem.part(start, min(start + m, problem.n))
        step, share = method(part, w, memory, t, **hyper), part.n / problem.n
        u, beside = u + share * step.u, beside + share * step.beside
        remembered = {k: remembered.get(k, 0) + share * v for k, v in step.memory.items()}
    return Step(u, beside, remembered)


# ------------------------------------------------------------------------------------------------------------- run


@dataclass
class Base:
    """A base optimiser's recipe: "sgd", "momentum", "adam", "adamw" or "rmsprop", torch.optim's defaults.

    ``weight_decay`` is L2, added to the gradient, but for "adamw", which shrinks the weights. ``momentum`` is read by
    "momentum" alone.
    """

    kind: str
    lr: float
    weight_decay: float | None = None  # None: 0.01 for adamw, else 0
    momentum: float = 0.9
    betas: tuple[float, float] = (0.9, 0.999)
    alpha: float = 0.99
    eps: float = 1e-8
    state: dict[str, Any] = field(default_factory=dict, repr=False)

    def fresh(self) -> Base:
        return copy.copy(self)._clear()

    def _clear(self) -> Base:
        self.state = {}
        return self

    @property
    def decay(self) -> float:
        if self.weight_decay is None:
            return 0.01 if self.kind == "adamw" else 0.0
        return self.weight_decay

    def step(self, w: Tensor, u: Tensor) -> Tensor:
        """The weights after a step with gradient ``u``."""
        if self.kind == "adamw":
            return self._adam(w * (1 - self.lr * self.decay), u)
        rule = {"sgd": self._sgd, "momentum": self._momentum, "adam": self._adam, "rmsprop": self._rmsprop}[self.kind]
        return rule(w, u + self.decay * w)

    def _sgd(self, w: Tensor, g: Tensor) -> Tensor:
        return w - self.lr * g

    def _momentum(self, w: Tensor, g: Tensor) -> Tensor:
        # no dampening: the buffer starts at the first gradient
        buffer = self.state["buffer"] = self.momentum * self.state.get("buffer", torch.zeros_like(w)) + g
        return w - self.lr * buffer

    def _adam(self, w: Tensor, g: Tensor) -> Tensor:
        (b1, b2), zero = self.betas, torch.zeros_like(w)
        k = self.state["k"] = self.state.get("k", 0) + 1
        first = self.state["first"] = b1 * self.state.get("first", zero) + (1 - b1) * g
        second = self.state["second"] = b2 * self.state.get("second", zero) + (1 - b2) * g * g
        return w - self.lr * (first / (1 - b1**k)) / ((second / (1 - b2**k)).sqrt() + self.eps)

    def _rmsprop(self, w: Tensor, g: Tensor) -> Tensor:
        old = self.state.get("second", torch.zeros_like(w))
        second = self.state["second"] = self.alpha * old + (1 - self.alpha) * g * g
        return w - self.lr * g / (second.sqrt() + self.eps)


class PerStep(list):
    """A hyper-parameter with one value per step, such as the probe ``z`` or the mask ``kept``."""


def trajectory(
    name: str,
    problems: Sequence[Problem],
    w0: Tensor,
    base: Base,
    steps: int,
    m: int | None = None,
    **hyper: Any,
) -> list[Tensor]:
    """Weights after each of ``steps`` steps, step ``t`` on ``problems[t]``; ``base`` itself is left as it was."""
    if len(problems) < steps:
        raise ValueError(f"{steps} steps need as many problems, not {len(problems)}")
    w, base, memory, path = w0.detach().double().clone(), base.fresh(), {}, []
    for t in range(steps):
        now = {k: v[t] if isinstance(v, PerStep) else v for k, v in hyper.items()}
        u, beside, memory = direction(name, problems[t], w, memory, t, m, **now)
        w = base.step(w, u) - base.lr * beside
        path.append(w)
    return path
