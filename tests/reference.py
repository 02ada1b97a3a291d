"""Independent book of the sharpness-aware methods, written from their formulas alone.

Everything lives on one flat float64 vector ``w``. A :class:`Problem` answers the per-example losses and gradients at
any ``w``. A method is a row of four slots, as in the papers' table::

    d     = sample(f)                      which gradient to ascend by
    eps   = rho * geometry(f, d)           the unit step of steepest ascent
    g_adv = gradient at w + eps            on the examples select(f, eps)
    u     = combine(f, g_adv)              the gradient fed to the base, and a vector that bypasses it

:func:`trajectory` runs a method beside a base optimizer. Nothing here is fast: every gradient is per example.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

TINY = 1e-12  # added to every norm that divides
Memory = dict[str, Tensor]


# ---------------------------------------------------------------------------------------------------------------- world


@dataclass(frozen=True)
class Problem:
    """What a method can ask of the world, at any flat ``w``: losses and gradients of the examples in ``rows``."""

    rows: slice
    losses_of: Callable[[Tensor, slice], Tensor]  # w, rows -> (n,)
    grads_of: Callable[[Tensor, slice], Tensor]  # w, rows -> (n, d)
    shapes: list[torch.Size]  # of the tensors that the flat vector holds
    full: Problem | None = None  # the larger batch of n-SAM

    @property
    def sizes(self) -> list[int]:
        return [shape.numel() for shape in self.shapes]

    @property
    def weight_like(self) -> list[bool]:
        """Whether a tensor has two dimensions or more."""
        return [len(shape) >= 2 for shape in self.shapes]

    @property
    def n(self) -> int:
        return self.rows.stop - self.rows.start

    def losses(self, w: Tensor) -> Tensor:
        return self.losses_of(w, self.rows)

    def grads(self, w: Tensor) -> Tensor:
        return self.grads_of(w, self.rows)

    def grad(self, w: Tensor) -> Tensor:
        """Return the gradient of the mean loss."""
        return self.grads(w).mean(0)

    def parts(self, m: int) -> list[Problem]:
        """Return the micro-batches of ``m`` examples, in order; the last may be smaller."""
        return [
            replace(self, rows=slice(start, min(start + m, self.rows.stop)))
            for start in range(self.rows.start, self.rows.stop, m)
        ]

    def each(self, v: Tensor, f: Callable[[Tensor], Tensor]) -> Tensor:
        """Return ``f`` of every tensor of a flat vector, flat again."""
        pieces = zip(v.split(self.sizes), self.shapes, strict=True)
        return torch.cat([f(piece.view(shape)).reshape(-1) for piece, shape in pieces])

    def spread(self, values: Sequence[float]) -> Tensor:
        """Return one value per tensor, repeated over that tensor's coordinates."""
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
        """Return the problem of ``loss(model(x), y)``, ``data = (x, y)`` with examples along the first dimension.

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

        def losses(w: Tensor, rows: slice) -> Tensor:
            with torch.no_grad():
                return torch.stack([one(w, i) for i in range(rows.start, rows.stop)])

        def grads(w: Tensor, rows: slice) -> Tensor:
            with torch.enable_grad():
                w = w.detach().clone().requires_grad_()
                return torch.stack([torch.autograd.grad(one(w, i), w)[0] for i in range(rows.start, rows.stop)])

        return cls(
            rows=slice(0, len(x)),
            losses_of=losses,
            grads_of=grads,
            shapes=[p.shape for p in named.values()],
            full=None if full is None else cls.from_module(model, loss, full),
        )


def flat(model: nn.Module) -> Tensor:
    """Return the ``w`` at which :meth:`Problem.from_module` finds the model now."""
    return torch.cat([p.detach().double().reshape(-1) for p in model.parameters() if p.requires_grad])


@dataclass
class Moment:
    """One evaluation of a method: at ``w``, with radius ``rho`` per coordinate, what is remembered and what will be."""

    p: Problem
    w: Tensor
    rho: Tensor
    memory: Memory
    remembered: Memory = field(default_factory=dict)
    base: Memory = field(default_factory=dict)  # the base optimizer's state after its last step
    t: int = 0

    @cached_property
    def g(self) -> Tensor:
        return self.p.grad(self.w)

    @property
    def movable(self) -> Tensor:
        """1 where the radius is positive; the rest takes no part in any direction or norm."""
        return (self.rho > 0).double()


# --------------------------------------------------------------------------------------------------------------- slots

Sample = Callable[[Moment], Tensor]
Geometry = Callable[[Moment, Tensor], Tensor]
Select = Callable[[Moment, Tensor], Tensor | slice]
Combine = Callable[[Moment, Tensor], tuple[Tensor, Tensor]]
Rule = Callable[[Moment], tuple[Tensor, Tensor]]


def mean(f: Moment) -> Tensor:
    return f.g


def on_full(f: Moment) -> Tensor:
    """n-SAM: the gradient on the larger batch."""
    return f.p.full.grad(f.w)


def reweighted(lam: float, norms: Callable[[Moment], Tensor]) -> Sample:
    """RW-SAM: p_i proportional to exp(lam n_i) weighs the ascent direction."""
    return lambda f: torch.softmax(lam * norms(f), 0) @ f.p.grads(f.w)


def exact_norms(f: Moment) -> Tensor:
    return (f.movable * f.p.grads(f.w)).norm(dim=1)


def effective_size(size: float) -> Callable[[Tensor], Tensor]:
    """Softmax weights with 1 / sum p^2 = size, by bisection of the inverse temperature itself."""

    def weights(norms: Tensor) -> Tensor:
        if size >= len(norms):
            return torch.full_like(norms, 1 / len(norms))
        low, high = 0.0, 1e6 / float(norms.max() - norms.min())
        while high - low > 1e-13 * high:
            lam = (low + high) / 2
            evenness = 1 / torch.softmax(lam * norms, 0).square().sum()
            low, high = (lam, high) if evenness > size else (low, lam)
        return torch.softmax(low * norms, 0)

    return weights


def both_weighted(weights: Callable[[Tensor], Tensor]) -> Rule:
    """RW-SAM's objective: the weights on both gradients of the sharpness term."""

    def rule(f: Moment) -> tuple[Tensor, Tensor]:
        p = weights(exact_norms(f))
        d = p @ f.p.grads(f.w)
        eps = f.rho * euclidean(f, f.movable * d)
        return perturbed(f, f.g + p @ f.p.grads(f.w + eps) - d)

    return rule


def probed_norms(z: Tensor, delta: float) -> Callable[[Moment], Tensor]:
    """One finite difference along ``z``, which is zeroed on the coordinates that cannot be perturbed."""

    def norms(f: Moment) -> Tensor:
        return (f.p.losses(f.w + delta * f.movable * z.double()) - f.p.losses(f.w)).abs() / delta

    return norms


def masked(kept: Sequence[float] | None) -> Sample:
    """ESAM: ascent in the ``kept`` tensors alone."""
    return lambda f: f.g if kept is None else f.p.spread(kept) * f.g


def friendly(sigma: float, decay: float, of: Sample = mean) -> Sample:
    """F-SAM: the direction uses the mean as it was before this step's gradient entered it."""

    def sample(f: Moment) -> Tensor:
        g, m = of(f), f.memory.get("m")
        f.remembered["m"] = g if m is None else decay * m + (1 - decay) * g
        return g if m is None else g - sigma * m

    return sample


def smoothed(theta: float, of: Sample = mean) -> Sample:
    """VaSSO: the direction is the moving average of the gradients."""

    def sample(f: Moment) -> Tensor:
        g, d = of(f), f.memory.get("d")
        f.remembered["d"] = g if d is None else (1 - theta) * d + theta * g
        return f.remembered["d"]

    return sample


def against_the_momentum(f: Moment) -> Tensor:
    """Momentum-SAM: where the base would go on its own."""
    return -f.base.get("buffer", f.base.get("first", torch.zeros_like(f.w)))


def centralised(f: Moment) -> Tensor:
    """GCSAM: each row of a matrix less its mean."""
    return f.p.each(f.g, lambda d: d - d.flatten(1).mean(1).view(-1, *[1] * (d.dim() - 1)) if d.dim() > 1 else d)


def outstanding(q: float) -> Sample:
    """ZSharp: of every matrix the entries whose z-score is larger in size than its quantile."""

    def kept(d: Tensor) -> Tensor:
        if d.dim() < 2:
            return d
        z = ((d - d.mean()) / d.std()).abs()
        if q == 0:
            return d
        return torch.where(z > torch.quantile(z, q), d, 0.0)

    return lambda f: f.p.each(f.g, kept)


def within_a_budget(sigma: float) -> Geometry:
    """LE-SAM: the radius is sigma / norm(g), and at most rho."""
    return lambda f, d: min(sigma / float(d.norm()) / float(f.rho.max()), 1.0) * euclidean(f, d)


def preconditioned(damping: float) -> Geometry:
    """Preconditioned SAM: along M^-1 g, M the root of the base's second moment, once there is one."""

    def geometry(f: Moment, d: Tensor) -> Tensor:
        if not f.t:
            return euclidean(f, d)
        v = f.base["second"]
        return euclidean(f, torch.where(v > 0, d / (v.sqrt() + damping), 0.0))

    return geometry


def euclidean(f: Moment, d: Tensor) -> Tensor:
    return d / (d.norm() + TINY)


def accumulated(f: Moment, d: Tensor) -> Tensor:
    """LightSAM: by the root of the sum of all squared norms so far, this one with them."""
    f.remembered["squares"] = f.memory.get("squares", torch.zeros(())) + d.square().sum()
    return d / f.remembered["squares"].sqrt()


def unnormalised(f: Moment, d: Tensor) -> Tensor:
    """USAM: the gradient as long as it is."""
    return d


def unified(lam: float) -> Geometry:
    return lambda f, d: (1 - lam) * d + lam * euclidean(f, d)


def adaptive(eta: float, everything: bool = False) -> Geometry:
    """ASAM: T^2 d / norm(T d), T = abs(w) + eta on tensors of two dimensions or more, or on every one; else 1."""

    def geometry(f: Moment, d: Tensor) -> Tensor:
        there = f.p.spread([everything or weight for weight in f.p.weight_like]) > 0
        T = torch.where(there, f.w.abs() + eta, 1.0)
        return T * T * d / ((T * d).norm() + TINY)

    return geometry


def fisher(eta: float) -> Geometry:
    """Fisher SAM: F^-1 d / sqrt(d^T F^-1 d), F = diag(1 + eta d^2)."""

    def geometry(f: Moment, d: Tensor) -> Tensor:
        natural = d / (1 + eta * d * d)
        return natural / (d.dot(natural).sqrt() + TINY)

    return geometry


def longer(factor: float) -> Geometry:
    return lambda f, d: factor * euclidean(f, d)


def everything(f: Moment, eps: Tensor) -> slice:
    return slice(None)


def sharpest(gamma: float) -> Select:
    """ESAM: the share gamma of the examples whose loss rises most."""

    def select(f: Moment, eps: Tensor) -> Tensor | slice:
        rise = f.p.losses(f.w + eps) - f.p.losses(f.w)
        return rise.topk(max(1, int(gamma * f.p.n))).indices if gamma < 1 else slice(None)

    return select


def perturbed(f: Moment, g_adv: Tensor) -> tuple[Tensor, Tensor]:
    return g_adv, torch.zeros_like(g_adv)


def weighted(gamma: float) -> Combine:
    """WSAM: the base sees g alone, gamma / (1 - gamma) (g_adv - g) bypasses it."""
    return lambda f, g_adv: (f.g, gamma / (1 - gamma) * (g_adv - f.g))


def coupled(gamma: float) -> Combine:
    kappa = gamma / (1 - gamma)
    return lambda f, g_adv: perturbed(f, kappa * g_adv + (1 - kappa) * f.g)


def surrogate_gap(alpha: float) -> Combine:
    """GSAM: g_adv less alpha of the part of g across it."""
    return lambda f, g_adv: perturbed(f, g_adv - alpha * (f.g - project(f.g, g_adv)))


def weighted_and_clipped(gamma: float, clip: float) -> Combine:
    """WSAM as its authors clip: g and g_adv each."""
    short = lambda v: v * min(1.0, clip / (float(v.norm()) + 1e-6))  # noqa: E731
    return lambda f, g_adv: (short(f.g), gamma / (1 - gamma) * (short(g_adv) - short(f.g)))


def as_long_as_g(f: Moment, g_adv: Tensor) -> tuple[Tensor, Tensor]:
    """SSAM."""
    return perturbed(f, g_adv * f.g.norm() / g_adv.norm())


def damped(alpha: float) -> Combine:
    """SANER: the entries whose ratio to g's lies between 0 and 1 lose a share."""

    def combine(f: Moment, g_adv: Tensor) -> tuple[Tensor, Tensor]:
        ratio = g_adv / f.g
        return perturbed(f, torch.where((ratio > 0) & (ratio < 1), (1 - alpha) * g_adv, g_adv))

    return combine


def on_the_great_circle(alpha: float) -> Combine:
    """XSAM: g_adv turned away from g by alpha of the angle between them, by an orthonormal basis of their plane."""

    def combine(f: Moment, g_adv: Tensor) -> tuple[Tensor, Tensor]:
        e = f.g / f.g.norm()
        across = g_adv - g_adv.dot(e) * e
        angle = torch.atan2(across.norm(), g_adv.dot(e)) * alpha
        return perturbed(f, g_adv.norm() * (angle.cos() * e + angle.sin() * across / across.norm()))

    return combine


def lookbehind(k: int, alpha: float | None) -> Rule:
    """Lookbehind beside SGD: alpha of the way that k descents lead, each at the end of one more ascent."""

    def rule(f: Moment) -> tuple[Tensor, Tensor]:
        at, h = f.w, []
        for _ in range(k):
            at = at + f.rho * euclidean(f, f.movable * f.p.grad(at))
            h.append(f.p.grad(at))
        fast = torch.stack(h).sum(0)
        if alpha is not None:
            return perturbed(f, alpha * fast)
        pairs = zip(h[0].split(f.p.sizes), fast.split(f.p.sizes), strict=True)
        return perturbed(f, f.p.spread([(1 + torch.cosine_similarity(a, b, dim=0)) / 2 for a, b in pairs]) * fast)

    return rule


def gradient_norm(alpha: float) -> Rule:
    """GAM: the Hessian times the unit gradient, first at w and then where that leads, by differences of length rho."""

    def rule(f: Moment) -> tuple[Tensor, Tensor]:
        def rise(at: Tensor) -> Tensor:
            g = f.p.grad(at)
            return f.p.grad(at + f.rho * euclidean(f, f.movable * g)) - g

        far = f.w + f.rho * euclidean(f, f.movable * rise(f.w))
        return perturbed(f, f.g + alpha * rise(far))

    return rule


def where_steep(start: float, end: float, steps: int, decay: float) -> Rule:
    """AE-SAM: SAM on steep ground, else the plain gradient."""

    def rule(f: Moment) -> tuple[Tensor, Tensor]:
        square = f.g.square().sum()
        mu = decay * f.memory.get("mu", square) + (1 - decay) * square
        variance = decay * f.memory.get("variance", torch.zeros(())) + (1 - decay) * (square - mu) ** 2
        f.remembered.update(mu=mu, variance=variance)
        c = start + (end - start) * min(1.0, f.t / steps)
        if square < mu + c * variance.sqrt():
            return perturbed(f, f.g)
        return perturbed(f, f.p.grad(f.w + f.rho * euclidean(f, f.movable * f.g)))

    return rule


def orthogonal_part_kept(f: Moment, g_adv: Tensor) -> tuple[Tensor, Tensor]:
    """LookSAM: SAM, remembering the part of g_adv across g."""
    f.remembered["g_v"] = g_adv - project(g_adv, f.g)
    return perturbed(f, g_adv)


def orthogonal_part_again(alpha: float) -> Sample:
    """LookSAM between its SAM steps: g plus what was remembered, alpha times as long as g."""

    def between(f: Moment) -> Tensor:
        g_v = f.memory["g_v"]
        f.remembered["g_v"] = g_v
        return f.g + alpha * f.g.norm() / (g_v.norm() + TINY) * g_v

    return between


def project(a: Tensor, b: Tensor) -> Tensor:
    """Return the component of ``a`` along ``b``, zero for a zero ``b``."""
    square = b.dot(b)
    return torch.zeros_like(a) if square == 0 else a.dot(b) / square * b


# ------------------------------------------------------------------------------------------------------------- methods


class Method(NamedTuple):
    """A row of the table: four slots, and what happens between every ``every``-th step, on the whole batch.

    ``rule`` is in the place of the slots where a method needs more than these.
    """

    sample: Sample = mean
    geometry: Geometry = euclidean
    select: Select = everything
    combine: Combine = perturbed
    every: int = 1
    between: Sample = mean
    rule: Rule | None = None


METHODS: dict[str, Callable[..., Method]] = {
    "SAM": Method,
    "USAM": lambda: Method(geometry=unnormalised),
    "UnifiedSAM": lambda lam: Method(geometry=unified(lam)),
    "NSAM": lambda: Method(sample=on_full),
    "ASAM": lambda eta: Method(geometry=adaptive(eta)),
    "FisherSAM": lambda eta: Method(geometry=fisher(eta)),
    "GSAM": lambda alpha: Method(combine=surrogate_gap(alpha)),
    "WSAM": lambda gamma: Method(combine=weighted(gamma)),
    "CoupledWSAM": lambda gamma: Method(combine=coupled(gamma)),
    "RWSAM": lambda lam: Method(sample=reweighted(lam, exact_norms)),
    "RWSAMProbe": lambda lam, z, delta: Method(sample=reweighted(lam, probed_norms(z, delta))),
    "ReweightedSharpness": lambda size=64, lam=None: Method(
        rule=both_weighted(effective_size(size) if lam is None else lambda norms: torch.softmax(lam * norms, 0))
    ),
    "WSAMClip": lambda gamma, clip_each: Method(combine=weighted_and_clipped(gamma, clip_each)),
    "MomentumSAM": lambda: Method(sample=against_the_momentum),
    "LESAM": lambda sigma: Method(geometry=within_a_budget(sigma)),
    "XSAM": lambda alpha: Method(combine=on_the_great_circle(alpha)),
    "SSAM": lambda: Method(combine=as_long_as_g),
    "SANER": lambda alpha: Method(combine=damped(alpha)),
    "LightSAM": lambda: Method(geometry=accumulated),
    "GAM": lambda alpha: Method(rule=gradient_norm(alpha)),
    "ZSharp": lambda q: Method(sample=outstanding(q)),
    "GCSAM": lambda: Method(sample=centralised),
    "AESAM": lambda start, end, steps, decay: Method(rule=where_steep(start, end, steps, decay)),
    "PreconditionedSAM": lambda damping=1e-8: Method(geometry=preconditioned(damping)),
    "LookbehindSAM": lambda k, alpha: Method(rule=lookbehind(k, alpha)),
    "ESAM": lambda beta, gamma, kept=None: Method(masked(kept), longer(1 / beta), sharpest(gamma)),
    "LookSAM": lambda k, alpha: Method(combine=orthogonal_part_kept, every=k, between=orthogonal_part_again(alpha)),
    "FSAM": lambda sigma, decay: Method(sample=friendly(sigma, decay)),
    "VaSSO": lambda theta: Method(sample=smoothed(theta)),
}


class Step(NamedTuple):
    """What a method answers: gradient for the base, vector that bypasses it, what it remembers."""

    u: Tensor
    beside: Tensor
    memory: Memory


def template(method: Method, f: Moment) -> tuple[Tensor, Tensor]:
    """Return the answer of a method of four slots."""
    eps = f.rho * method.geometry(f, f.movable * method.sample(f))
    g_adv = f.p.grads(f.w + eps)[method.select(f, eps)].mean(0)
    return method.combine(f, g_adv)


def direction(
    method: Method,
    problem: Problem,
    w: Tensor,
    memory: Memory,
    t: int,
    rho: float | Sequence[float],
    m: int | None = None,
    base: Memory | None = None,
) -> Step:
    """Return step ``t`` of a method; over micro-batches of ``m`` if given, the size-weighted mean of their answers.

    ``rho`` is one radius, or one per tensor; a tensor of radius 0 takes no part in the ascent direction.
    """
    each = problem.spread(rho if isinstance(rho, Sequence) else [rho] * len(problem.sizes))
    if t % method.every:
        f = Moment(problem, w, each, memory)
        return Step(method.between(f), torch.zeros_like(w), f.remembered)
    u, beside, remembered = torch.zeros_like(w), torch.zeros_like(w), {}
    for part in problem.parts(m or problem.n):
        f, share = Moment(part, w, each, memory, {}, base or {}, t), part.n / problem.n
        of_part = method.rule(f) if method.rule else template(method, f)
        u, beside = u + share * of_part[0], beside + share * of_part[1]
        remembered = {k: remembered.get(k, 0) + share * v for k, v in f.remembered.items()}
    return Step(u, beside, remembered)


# ------------------------------------------------------------------------------------------------------------- run


@dataclass
class Base:
    """A base optimizer's recipe: "sgd", "momentum", "adam", "adamw" or "rmsprop", torch.optim's defaults.

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
        """Return the weights after a step with gradient ``u``."""
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
    rho: float | Sequence[float],
    m: int | None = None,
    **hyper: Any,
) -> list[Tensor]:
    """Return the weights after each step, step ``t`` on ``problems[t]``; ``base`` itself is left as it was."""
    w, base, memory, path = w0.detach().double().clone(), base.fresh(), {}, []
    for t, problem in enumerate(problems):
        now = {k: v[t] if isinstance(v, PerStep) else v for k, v in hyper.items()}
        u, beside, memory = direction(METHODS[name](**now), problem, w, memory, t, rho, m, base.state)
        w = base.step(w, u) - base.lr * beside
        path.append(w)
    return path
