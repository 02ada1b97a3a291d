"""Which weight every example gets: from the norms of the per-example gradients."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from steppe.batch import Batch, chunks_of
from steppe.engine import checks
from steppe.engine.oracle import Oracle
from steppe.engine.replay import generator
from steppe.engine.supervised import Supervised
from steppe.engine.vector import TINY, Vector, shard_like, wide
from steppe.pieces.protocol import Declaration


@dataclass(frozen=True)
class FiniteDifference:
    """``norm(grad f_i) ~ abs(f_i(w + delta z) - f_i(w)) / delta`` with Rademacher ``z``: RW-SAM's probe.

    The difference estimates ``abs(<z, grad f_i>)``: its square has mean ``norm(grad f_i)^2``, itself it has mean about
    0.8 of the norm, and one probe's relative standard deviation is about 0.76. Several probes are joined by the root of
    their mean square.

    ``delta`` is no absolute number: ``norm(delta z) = length * rho`` with the largest rho of any group, that is
    ``delta = length * rho / sqrt(d)`` for ``d`` perturbed coordinates. (A bare 1e-3 moves 11 M parameters by 3.3.)

    Args:
        length: the probe's length in units of rho.
        probes: how many directions; one more forward each.
        seed: of the directions, which depend on it and on the step alone.

    Raises:
        ValueError: ``length`` is not above 0, ``probes`` is no positive integer.
        TypeError: in ``step``, where parameters are in low precision, which cannot hold so small a step.
    """

    length: float = 0.1
    probes: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        checks.positive("length", self.length)
        checks.positive_integer("probes", self.probes)

    def __call__(self, f: Oracle) -> Tensor:
        w = f.movable(f.w)
        if any(wide(t) is not t for t in w.present()):
            raise TypeError(
                "FiniteDifference needs parameters in float32 or float64: low precision cannot hold its small step; "
                "keep the parameters in float32 and run the model under torch.autocast"
            )
        d = max(1, sum(t.numel() for t in w.present()))
        delta = self.length * f.rho.largest() / d**0.5
        moved = []
        for k in range(self.probes):
            with f.at(delta * self.direction(w, f.step * self.probes + k)):
                moved.append(f.losses())
        here = f.losses()  # last: the graph of this forward serves the backward that follows
        return torch.stack([(there - here) / delta for there in moved]).square().mean(0).sqrt()

    def direction(self, w: Vector, draw: int) -> Vector:
        """Return ``z``: +1 or -1 in every coordinate."""
        random = {t.device: generator(self.seed, draw, t.device) for t in w.present()}
        return w.map(lambda t: shard_like(_signs(t, random[t.device]), t))


def _signs(t: Tensor, random: torch.Generator) -> Tensor:
    """Return +1 or -1 for every entry, eight from a byte: the same however the tensor is sharded."""
    of_byte = (torch.arange(256, device=t.device)[:, None] >> torch.arange(8, device=t.device) & 1) * 2 - 1
    drawn = torch.randint(256, (-(-t.numel() // 8),), generator=random, device=t.device, dtype=torch.int32)
    return of_byte.to(t.dtype).index_select(0, drawn).view(-1)[: t.numel()].view(t.shape)


@dataclass(frozen=True)
class Exact:
    """``norm(grad f_i)`` from the factors of the first pass: without a probe (not in the paper).

    The weighted gradient that follows is one weight-gradient pass; of accumulated batches, whose factors are not all
    held at once, one more forward and backward. Where the model does not factor (:mod:`steppe.factored`; with
    ``parallel=False`` none does), ``otherwise`` answers.
    """

    otherwise: Callable[[Oracle], Tensor] = FiniteDifference()

    declares: ClassVar[Declaration] = Declaration(weights="norms")

    def __call__(self, f: Oracle) -> Tensor:
        norms = f.example_norms()
        return self.otherwise(f) if norms is None else norms


@dataclass(frozen=True)
class Softmax:
    """``p = softmax(lam norm(grad f_i))``: the weights of Reweighted SAM (arXiv 2509.18001).

    Args:
        lam: the inverse temperature, in units of 1 / norm(grad f_i); 0 is uniform weights.
        probe: ``(f) -> norms``, shape ``(n,)``.

    Raises:
        ValueError: ``lam`` is negative.
    """

    lam: float = 0.5
    probe: Callable[[Oracle], Tensor] = Exact()

    declares: ClassVar[Declaration] = Declaration(examples=True)

    def __post_init__(self) -> None:
        checks.non_negative("lam", self.lam)

    def __call__(self, f: Oracle) -> Tensor:
        return self.weights(self.probe(f))

    def weights(self, norms: Tensor) -> Tensor:
        """Return ``softmax(lam norms)`` along the last dimension."""
        return torch.softmax(self.lam * wide(norms), dim=-1)


@dataclass(frozen=True)
class EffectiveSize:
    """``p = softmax(lam norm(grad f_i))`` with ``lam`` such that ``1 / sum_i p_i^2 = size``.

    ``1 / sum_i p_i^2`` is the effective number of examples. It falls from ``n`` at ``lam`` 0 towards 1, so one ``lam``
    gives it any size between; it is found anew each step, by bisection, and the weights do not depend on the scale of
    the loss. A batch of ``size`` examples or fewer has uniform weights. Where more than ``size`` examples share the
    largest norm, they share the weight.

    Args:
        size: the effective number of examples, at least 1.
        probe: ``(f) -> norms``, shape ``(n,)``.

    Raises:
        ValueError: ``size`` is below 1.
    """

    size: float = 64
    probe: Callable[[Oracle], Tensor] = Exact()

    declares: ClassVar[Declaration] = Declaration(examples=True)

    def __post_init__(self) -> None:
        checks.number("size", self.size, "a number >= 1", low=1.0)

    def __call__(self, f: Oracle) -> Tensor:
        return self.weights(self.probe(f))

    def weights(self, norms: Tensor) -> Tensor:
        """Return the weights along the last dimension."""
        x = wide(norms) - norms.amax(-1, keepdim=True)
        x = x / (x.amin(-1, keepdim=True).abs() + TINY)  # in [-1, 0]: the temperature has no unit
        if self.size >= norms.shape[-1]:
            return torch.softmax(0 * x, dim=-1)
        low, high = torch.full_like(x[..., :1], -12.0), torch.full_like(x[..., :1], 20.0)  # of log lam
        for _ in range(40):
            middle = (low + high) / 2
            too_even = 1 / torch.softmax(middle.exp() * x, dim=-1).square().sum(-1, keepdim=True) > self.size
            low, high = torch.where(too_even, middle, low), torch.where(too_even, high, middle)
        return torch.softmax(low.exp() * x, dim=-1)


@dataclass(frozen=True)
class ByClass:
    """``p_i = lam (1 - n_y / N)^gamma / n`` for an example of class ``y``: Focal-SAM (arXiv 2505.01660).

    ``n_y`` of the ``N`` training examples are of its class, so the sharpness of rare classes counts more. The weights
    do not sum to 1. ``SharpnessAware(base, BothWeighted(ByClass(counts)), rho)`` is the update of the authors' code, in
    three passes (they take two forwards and three backwards). The defaults are theirs for CIFAR-10 from scratch.

    Args:
        counts: training examples of each class.
        gamma: how fast the weight falls with the class's share, at least 0.
        lam: the weight of sharpness, at least 0.

    Raises:
        ValueError: ``counts`` has no class, or a negative number; ``gamma`` or ``lam`` is negative.
        TypeError: in ``step``, where the batch is none of :meth:`steppe.Batch.supervised` with class numbers.
    """

    counts: Sequence[int]
    gamma: float = 3.0
    lam: float = 0.5

    declares: ClassVar[Declaration] = Declaration(examples=True)

    def __post_init__(self) -> None:
        for name in ("gamma", "lam"):
            checks.non_negative(name, getattr(self, name))
        if not sum(self.counts) > 0 or min(self.counts) < 0:
            raise ValueError(f"counts must hold the number of training examples of each class, got {self.counts!r}")

    def __call__(self, f: Oracle) -> Tensor:
        batch = f.batch("their classes")
        labels = torch.cat([self._labels(part) for part in chunks_of(batch)])
        n = sum(self.counts)
        by_class = [self.lam * (1 - n_y / n) ** self.gamma / len(batch) for n_y in self.counts]
        return torch.tensor(by_class, dtype=wide(f.w.present()[0]).dtype, device=labels.device)[labels]

    def _labels(self, batch: Batch) -> Tensor:
        labels = batch.data[1] if isinstance(batch.loss, Supervised) else None
        if not isinstance(labels, Tensor) or labels.dtype != torch.int64 or labels.dim() != 1:
            raise TypeError(
                "ByClass needs a batch of steppe.Batch.supervised whose targets are class numbers, int64 of shape (n,)"
            )
        return labels
