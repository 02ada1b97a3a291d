"""Which gradient to ascend by: which examples, which weights on them, which memory."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from steppe.engine import checks
from steppe.engine.oracle import Oracle
from steppe.engine.replay import generator
from steppe.engine.sampling import gradient_of_subset
from steppe.engine.vector import Vector, is_sharded, shard_like
from steppe.pieces.protocol import Declaration, declared, pieces_of
from steppe.pieces.weights import Exact, Softmax


@dataclass(frozen=True)
class Mean:
    """``g``, the gradient of the mean loss on the batch (SAM)."""

    declares: ClassVar[Declaration] = Declaration(weights="uniform")

    def __call__(self, f: Oracle) -> Vector:
        return f.g


@dataclass(frozen=True)
class OnFull:
    """The gradient on another, larger batch: n-SAM (arXiv 2509.18001). The optimizer's ``full=`` is its closure."""

    def __call__(self, f: Oracle) -> Vector:
        return f.grad_on_full()


@dataclass(frozen=True)
class Subset:
    """``d = sample`` on ``m`` random examples of the batch: ``1 + m / n`` passes in place of 2.

    Only the direction comes from the subset; the gradient at ``w + eps`` is that of the whole batch. A small ascent
    batch was used for NFNets (Brock et al. 2021, arXiv 2102.06171) and by Bahri et al. 2022 (arXiv 2110.08529).

    It is SAM with a smaller radius along ``g``, not m-SAM: ``norm(d)^2`` has the mean
    ``norm(g)^2 + tr V / m (n - m) / (n - 1)`` over the draws, with ``V`` the covariance of the batch's per-example
    gradients (divided by ``n``). So raise rho by up to ``sqrt(1 + tr V (n - m) / (m (n - 1) norm(g)^2))``, which is
    between 1 and about ``sqrt(n / m)``.

    The draw depends on the seed, the step and the rank. Where ``combine`` asks for the batch's gradient at ``w``, that
    is one more pass, and running statistics see it; else they see the pass at ``w + eps``.

    Args:
        m: examples in the subset; at or above the batch size it is ``sample``.
        sample: ``(f) -> Vector``, asked on the subset.
        seed: of the draws.

    Raises:
        ValueError: ``m`` is no positive integer, or ``sample`` takes other examples than those of the batch.
        TypeError: in ``step``, where the closure is no :class:`~steppe.Batch`.
    """

    m: int
    sample: Callable[[Oracle], Vector] = Mean()
    seed: int = 0

    declares: ClassVar[Declaration] = Declaration(parts=True)

    def __post_init__(self) -> None:
        checks.positive_integer("m", self.m)
        elsewhere = any(isinstance(piece, OnFull | Subset) for piece in pieces_of(self.sample))
        if elsewhere or declared(self.sample).base_state:
            raise ValueError(f"sample must be a gradient on the batch, to be taken on a subset, got {self.sample!r}")

    def __call__(self, f: Oracle) -> Vector:
        return gradient_of_subset(f, self.sample, self.m, self.seed)


@dataclass(frozen=True)
class Friendly:
    """``d = g - sigma a``, then ``a <- decay a + (1 - decay) g``: F-SAM (arXiv 2403.12350; the authors' code).

    ``a`` follows the full gradient; ascending without it follows the noise of the batch. As in the authors' code ``d``
    uses the old ``a``, and at a parameter's first step ``d = g`` and ``a = g``. With sigma 1 and equal batches ``d`` is
    rounding noise, which the Euclidean geometry scales up to length rho.

    Args:
        sigma: the share of the running mean that is taken off, at least 0.
        decay: of the running mean, in [0, 1].
        of: the sample that gives ``g``.

    Raises:
        ValueError: ``sigma`` is negative, ``decay`` is not in [0, 1].
    """

    sigma: float = 1.0
    decay: float = 0.9
    of: Callable[[Oracle], Vector] = Mean()

    declares: ClassVar[Declaration] = Declaration(remembers=frozenset({"friendly"}))

    def __post_init__(self) -> None:
        checks.non_negative("sigma", self.sigma)
        checks.share("decay", self.decay)

    def __call__(self, f: Oracle) -> Vector:
        g = self.of(f)
        f.remember("friendly", g, rate=1 - self.decay)
        a = f.recall("friendly", default=0.0 * g)
        return (g - self.sigma * a).where(t is not None for t in g.tensors)


@dataclass(frozen=True)
class Smoothed:
    """``d <- (1 - theta) d + theta g``, first ``d = g``: VaSSO (arXiv 2309.15639).

    Args:
        theta: the weight of the new gradient, in (0, 1].
        of: the sample that gives ``g``.

    Raises:
        ValueError: ``theta`` is not in (0, 1].
    """

    theta: float = 0.9
    of: Callable[[Oracle], Vector] = Mean()

    declares: ClassVar[Declaration] = Declaration(remembers=frozenset({"smoothed"}))

    def __post_init__(self) -> None:
        checks.positive_share("theta", self.theta)

    def __call__(self, f: Oracle) -> Vector:
        g = self.of(f)
        d = f.recall("smoothed", default=g).lerp(g, self.theta).where(t is not None for t in g.tensors)
        f.remember("smoothed", d)
        return d


@dataclass(frozen=True)
class Stale:
    """``g`` of the step before, at the weights there; first ``g``: AsyncSAM (arXiv 2503.11147), on one device."""

    of: Callable[[Oracle], Vector] = Mean()

    declares: ClassVar[Declaration] = Declaration(remembers=frozenset({"stale"}))

    def __call__(self, f: Oracle) -> Vector:
        g = self.of(f)
        f.remember("stale", g)
        return f.recall("stale", default=g).where(t is not None for t in g.tensors)


@dataclass(frozen=True)
class Momentum:
    """``-v``, the base optimizer's momentum: Momentum-SAM (arXiv 2401.12033). No pass.

    ``v`` is ``momentum_buffer`` (SGD, Muon) or ``exp_avg`` (Adam and its relatives), as the base's last step left it.
    Before the base's first step there is none, and nothing is perturbed. Where only some of several base optimizers
    keep it, the parameters of the others are not perturbed, and the optimizer warns once.
    """

    declares: ClassVar[Declaration] = Declaration(base_state=frozenset({"momentum_buffer", "exp_avg"}))

    def __call__(self, f: Oracle) -> Vector:
        return -1.0 * (f.base_state("momentum_buffer") + f.base_state("exp_avg"))


@dataclass(frozen=True)
class Centralised:
    """``d`` less its mean over each row of a weight's outputs: GCSAM (arXiv 2501.11584).

    The mean is over all dimensions but the first, of parameters that have two or more.

    Args:
        of: the sample whose vector is centralised.
    """

    of: Callable[[Oracle], Vector] = Mean()

    def __call__(self, f: Oracle) -> Vector:
        return self.of(f).map(lambda t: t - t.mean(tuple(range(1, t.dim())), keepdim=True) if t.dim() > 1 else t)


@dataclass(frozen=True)
class Filtered:
    """The entries of ``d`` that differ most from the mean of their tensor: ZSharp (arXiv 2505.02369).

    An entry is kept where its z-score ``(d - mean) / deviation`` is larger in size than the quantile ``q`` of its
    tensor's; the others are 0. Tensors of fewer than two dimensions are kept whole, as in the authors' code, and so are
    tensors of which no entry stands out.

    Args:
        q: the share of the entries that are left out, in [0, 1); 0 is ``d`` itself.
        of: the gradient that is filtered.

    Raises:
        ValueError: ``q`` is not in [0, 1).
    """

    q: float = 0.95
    of: Callable[[Oracle], Vector] = Mean()

    def __post_init__(self) -> None:
        checks.number("q", self.q, "a number in [0, 1)", below=1.0)

    def __call__(self, f: Oracle) -> Vector:
        return self.of(f).map(self._filtered)

    def _filtered(self, d: Tensor) -> Tensor:
        if d.dim() < 2 or self.q == 0:
            return d
        whole = d.full_tensor() if is_sharded(d) else d  # type: ignore[attr-defined]
        z = (whole - whole.mean()).abs()  # the deviation does not change their order
        kept = z > z.flatten().kthvalue(int(self.q * (z.numel() - 1)) + 1).values
        return shard_like(torch.where(kept | ~kept.any(), whole, 0.0), d)


@dataclass(frozen=True)
class Masked:
    """``g`` on a random choice of tensors: the stochastic weight perturbation of ESAM (arXiv 2110.03141).

    Every tensor that may move is kept with probability ``beta`` (at least one is), anew each step; the backward pass
    skips the others' weight gradients. The choice is by tensor, as in the authors' code, and depends on ``seed`` and
    the step alone, so ranks agree and resume is exact. The factor ``1 / beta`` is geometry: ``Scaled(1 / beta)``.

    Args:
        beta: the probability that a tensor is kept, in (0, 1].
        seed: of the choices.

    Raises:
        ValueError: ``beta`` is not in (0, 1].
    """

    beta: float = 0.6
    seed: int = 0

    def __post_init__(self) -> None:
        checks.positive_share("beta", self.beta)

    def __call__(self, f: Oracle) -> Vector:
        return f.g if self.beta == 1 else f.grad(wrt=self.kept(f.step, [t is not None for t in f.movable(f.w).tensors]))

    def kept(self, step: int, movable: Sequence[bool]) -> list[bool]:
        """Choose the tensors of this step among those that may move."""
        random = generator(self.seed, step)
        n = sum(movable)
        chosen = (torch.rand(n, generator=random) < self.beta).tolist()
        if n and not any(chosen):
            chosen[int(torch.randint(n, (), generator=random))] = True
        draw = iter(chosen)
        return [bool(may) and next(draw) for may in movable]


@dataclass(frozen=True)
class Reweighted:
    """``d = sum_i p_i grad f_i``, ``p = softmax(lam norm(grad f_i))``: Reweighted SAM (arXiv 2509.18001), as reported.

    What the paper says: the direction maximises ``<sum p_i grad f_i, eps> + H(P) / lam`` over weights ``p`` and unit
    ``eps``, which after relaxing the norm of the sum gives ``p_i ~ exp(lam norm(grad f_i))`` over the mini-batch; the
    norms are estimated by one finite difference with a Rademacher direction, one extra forward.
    What is inferred from reports of it: the weights act on the perturbation alone, the second gradient is that of the
    uniform mean. The reported cost, 7/6 of SAM's, does not tell: weights on both gradients cost the same. The gradient
    of the paper's objective has them on both: :class:`~steppe.BothWeighted`.
    What is our choice: exact norms where the model factors; raw norms, neither standardised nor clipped; ``lam``'s
    default; the probe's length relative to rho; a softmax over the micro-batch under ``m``, and over a rank's own
    examples under data parallelism. The paper's values are not known to us.

    Args:
        lam: the inverse temperature, in units of 1 / norm(grad f_i); 0 is SAM.
        probe: ``(f) -> norms``, shape ``(n,)``.

    Raises:
        ValueError: ``lam`` is negative.
    """

    lam: float = 0.5
    probe: Callable[[Oracle], Tensor] = Exact()

    def __post_init__(self) -> None:
        checks.non_negative("lam", self.lam)

    @property
    def declares(self) -> Declaration:
        """The examples; exact norms allow shared passes."""
        exact = declared(self.probe).weights == "norms"
        return Declaration(examples=True, weights="norms" if exact else None)

    def __call__(self, f: Oracle) -> Vector:
        return f.grad(weights=self.weights(self.probe(f)))

    def weights(self, norms: Tensor) -> Tensor:
        """Return ``softmax(lam norms)`` along the last dimension."""
        return Softmax(self.lam).weights(norms)
