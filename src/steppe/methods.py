"""The methods, one row each: which pieces make it.

Notation: ``g`` gradient of the batch's mean loss at ``w``; ``eps`` perturbation; ``g_adv`` gradient at ``w + eps``;
``u`` what the base optimizer sees. Norms are Euclidean, over all parameters together. A docstring lists what is the
method's own; the arguments that all methods share are added to it at the end of this file. Defaults are those of the
papers or their code where these give one.
"""

from __future__ import annotations

from typing import Unpack

from steppe.engine.docstrings import add_shared_arguments
from steppe.engine.passes import Closure
from steppe.optimizer import SharpnessAware
from steppe.options import Base, Options
from steppe.pieces.combine import Coupled, RememberOrthogonal, ReuseOrthogonal, SurrogateGap, Weighted
from steppe.pieces.geometry import Adaptive, Fisher, Matrices, Scaled, Unified, Unnormalised, Which
from steppe.pieces.rules import BothWeighted
from steppe.pieces.sample import Friendly, Masked, OnFull, Reweighted, Smoothed
from steppe.pieces.select import Sharpest
from steppe.pieces.weights import EffectiveSize, Softmax
from steppe.rule import Every, Rule
from steppe.schedule import Schedule

Radius = float | Schedule
MATRICES = Matrices()


class SAM(SharpnessAware):
    """``eps = rho g / norm(g)``, ``u = g_adv``; with ``m=`` it is m-SAM.

    Costs two passes. It is :class:`~steppe.Rule` with its default pieces.

    Source: Foret et al. 2021, arXiv 2010.01412.

    Example:
        >>> optimizer = SAM(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), rho=0.05)
        >>> loss = optimizer.step(closure)
    """

    def __init__(self, base: Base, rho: Radius = 0.05, **options: Unpack[Options]) -> None:
        super().__init__(base, Rule(), rho, **options)


class USAM(SharpnessAware):
    """``eps = rho g``, ``u = g_adv``: unnormalised SAM.

    Costs two passes. The perturbation scales with the gradient, and with the scale of the loss.

    Source: Andriushchenko and Flammarion 2022, arXiv 2206.06232.
    """

    def __init__(self, base: Base, rho: Radius = 0.05, **options: Unpack[Options]) -> None:
        super().__init__(base, Rule(geometry=Unnormalised()), rho, **options)


class UnifiedSAM(SharpnessAware):
    """``eps = rho (1 - lam + lam / norm(g)) g``, ``u = g_adv``; ``lam`` 1 is SAM, 0 is USAM.

    Costs two passes.

    Source: arXiv 2503.02225.

    Args:
        lam: how much of the step is normalised, in [0, 1].
    """

    def __init__(self, base: Base, rho: Radius = 0.05, lam: float = 0.5, **options: Unpack[Options]) -> None:
        super().__init__(base, Rule(geometry=Unified(lam)), rho, **options)


class ASAM(SharpnessAware):
    """``eps = rho T^2 g / norm(T g)``, ``T = abs(w) + eta`` on weights, 1 on biases.

    Costs two passes. Its radius is about ten times SAM's.

    Source: Kwon et al. 2021, arXiv 2102.11600.

    Args:
        eta: added to ``abs(w)``, at least 0.
        on: which parameters are adapted: :class:`~steppe.Matrices` (two or more dimensions), :class:`~steppe.Named`
            (``Named("weight")`` is the authors' code to the letter) or :class:`~steppe.Everything` (biases too, as in
            davda54/sam).
    """

    def __init__(
        self, base: Base, rho: Radius = 0.5, eta: float = 0.01, on: Which = MATRICES, **options: Unpack[Options]
    ) -> None:
        super().__init__(base, Rule(geometry=Adaptive(eta, on)), rho, **options)


class FisherSAM(SharpnessAware):
    """``eps = rho F^-1 g / sqrt(g F^-1 g)``, ``F = diag(1 + eta g^2)``.

    Costs two passes.

    Source: Kim et al. 2022, arXiv 2206.04920.

    Args:
        eta: the weight of the squared gradient in the Fisher diagonal, at least 0.
    """

    def __init__(self, base: Base, rho: Radius = 0.1, eta: float = 1.0, **options: Unpack[Options]) -> None:
        super().__init__(base, Rule(geometry=Fisher(eta)), rho, **options)


class GSAM(SharpnessAware):
    """SAM's ``eps``, ``u = g_adv - alpha (g - proj(g, g_adv))``.

    Costs two passes. The paper's radius follows the learning rate: ``rho=schedule.ProportionalToLR(...)``.

    Source: Zhuang et al. 2022, arXiv 2203.08065.

    Args:
        alpha: how strongly the surrogate gap is narrowed, at least 0.
    """

    def __init__(self, base: Base, rho: Radius = 0.05, alpha: float = 0.4, **options: Unpack[Options]) -> None:
        super().__init__(base, Rule(combine=SurrogateGap(alpha)), rho, **options)


class ESAM(SharpnessAware):
    """SAM's ``eps`` on a random share ``beta`` of the tensors, ``g_adv`` on the sharpest share ``gamma`` of the
    examples.

    ``norm(eps) = rho / beta``, as in the authors' code. The sharpest examples are those whose loss rises most.
    Needs a :class:`~steppe.Batch` unless ``gamma`` is 1. Costs 2 + ``gamma`` forwards and 1 + ``gamma`` backwards,
    the first backward partial.

    Source: Du et al. 2022, arXiv 2110.03141.

    Args:
        beta: the share of the tensors that are perturbed, in (0, 1].
        gamma: the share of the examples in the second gradient, in (0, 1].
    """

    def __init__(
        self, base: Base, rho: Radius = 0.05, beta: float = 0.6, gamma: float = 0.5, **options: Unpack[Options]
    ) -> None:
        rule = Rule(sample=Masked(beta), geometry=Scaled(1 / beta), select=Sharpest(gamma))
        super().__init__(base, rule, rho, **options)


class WSAM(SharpnessAware):
    """SAM's ``eps``, ``u = g``, and ``w <- w - lr gamma / (1 - gamma) (g_adv - g)`` beside the base.

    Costs two passes. The sharpness term bypasses the base's momentum and preconditioner: under momentum mu its steady
    weight against the loss is ``(1 - mu) gamma / (1 - gamma)``, so with mu 0.9, ``gamma`` 0.5 weighs 0.1,
    which is not SAM.

    Source: Yue et al. 2023, arXiv 2305.15817, algorithm 2.

    Args:
        gamma: the weight of sharpness, in [0, 1): ``L + gamma / (1 - gamma) (L_SAM - L)`` is minimised.
    """

    def __init__(self, base: Base, rho: Radius = 0.05, gamma: float = 0.9, **options: Unpack[Options]) -> None:
        super().__init__(base, Rule(combine=Weighted(gamma)), rho, **options)


class CoupledWSAM(SharpnessAware):
    """SAM's ``eps``, ``u = g + gamma / (1 - gamma) (g_adv - g)``.

    Costs two passes. ``gamma`` 1/2 is SAM beside any base.

    Source: Yue et al. 2023, arXiv 2305.15817, algorithm 4.

    Args:
        gamma: the weight of sharpness, in [0, 1): ``L + gamma / (1 - gamma) (L_SAM - L)`` is minimised.
    """

    def __init__(self, base: Base, rho: Radius = 0.05, gamma: float = 0.9, **options: Unpack[Options]) -> None:
        super().__init__(base, Rule(combine=Coupled(gamma)), rho, **options)


class NSAM(SharpnessAware):
    """``eps = rho g_full / norm(g_full)``, ``u = g_adv`` on the batch: n-SAM.

    Costs two passes, one over ``full``, whose loss ``step`` returns. Running statistics see that pass. ``m`` cuts the
    second gradient.

    Source: Luo et al. 2025, arXiv 2509.18001.

    Args:
        full: a closure over the full data or a larger batch: zero, forward, backward, return the loss.
    """

    def __init__(self, base: Base, rho: Radius = 0.05, *, full: Closure, **options: Unpack[Options]) -> None:
        if not callable(full):
            raise TypeError(f"full must be a closure over the larger batch, got {full!r}")
        super().__init__(base, Rule(sample=OnFull()), rho, full=full, **options)


class RWSAM(SharpnessAware):
    """``eps = rho d / norm(d)``, ``d = sum_i p_i g_i``, ``p = softmax(lam norm(g_i))``, ``u = g_adv``.

    The weights act on the perturbation alone, as reported. :class:`~steppe.ReweightedSharpness` has them on both
    gradients, which is the gradient of the paper's objective.

    Needs a :class:`~steppe.Batch`. Costs two passes where the model factors; else three forwards and two backwards, as
    in the paper. See :class:`~steppe.Reweighted` for what the paper says, what is inferred and what is our choice.

    Source: Luo et al. 2025, arXiv 2509.18001.

    Args:
        lam: the inverse temperature of the weights, in units of ``1 / norm(g_i)``, at least 0; 0 is SAM.
    """

    def __init__(self, base: Base, rho: Radius = 0.05, lam: float = 0.5, **options: Unpack[Options]) -> None:
        super().__init__(base, Rule(sample=Reweighted(lam)), rho, **options)


class ReweightedSharpness(SharpnessAware):
    """``u = g + sum_i p_i grad f_i(w + eps) - d``, ``eps = rho d / norm(d)``, ``d = sum_i p_i g_i``, ``p = softmax(lam
    norm(g_i))`` with ``1 / sum_i p_i^2 = size``.

    RW-SAM with the weights on both gradients of the sharpness term: :class:`~steppe.BothWeighted`. Needs a
    :class:`~steppe.Batch`. Costs two passes where the model factors; else four forwards and three backwards. In our
    trials it is level with m-SAM at ``m = size``, and collapses earlier at large radii.

    Source: the objective of Luo et al. 2025, arXiv 2509.18001; the weights on both gradients and the size are ours.

    Args:
        size: the effective number of examples, at least 1, found each step (:class:`~steppe.EffectiveSize`).
        lam: a fixed inverse temperature in place of ``size``, in units of ``1 / norm(g_i)``, at least 0.
    """

    def __init__(
        self,
        base: Base,
        rho: Radius = 0.05,
        size: float = 64,
        lam: float | None = None,
        **options: Unpack[Options],
    ) -> None:
        weights = EffectiveSize(size) if lam is None else Softmax(lam)
        super().__init__(base, BothWeighted(weights), rho, **options)


class LookSAM(SharpnessAware):
    """SAM every ``k``-th step, keeping ``g_v = g_adv - proj(g_adv, g)``; between, ``u = g + alpha norm(g) /
    norm(g_v) g_v``.

    Costs ``1 + 1 / k`` passes.

    Source: Liu et al. 2022, arXiv 2203.02714.

    Args:
        k: how many steps apart the SAM steps are, at least 1.
        alpha: how much of the remembered direction is added between them, at least 0.
    """

    def __init__(
        self, base: Base, rho: Radius = 0.1, k: int = 10, alpha: float = 0.7, **options: Unpack[Options]
    ) -> None:
        rule = Every(k, Rule(combine=RememberOrthogonal()), between=ReuseOrthogonal(alpha))
        super().__init__(base, rule, rho, **options)


class FSAM(SharpnessAware):
    """``eps = rho d / norm(d)``, ``d = g - sigma a``, ``a <- decay a + (1 - decay) g``, ``u = g_adv``: Friendly SAM.

    Costs two passes.

    Source: Li et al. 2024, arXiv 2403.12350.

    Args:
        sigma: how much of the remembered mean gradient is subtracted, at least 0.
        decay: how slowly it follows the gradients, in [0, 1].
    """

    def __init__(
        self, base: Base, rho: Radius = 0.05, sigma: float = 1.0, decay: float = 0.9, **options: Unpack[Options]
    ) -> None:
        super().__init__(base, Rule(sample=Friendly(sigma, decay)), rho, **options)


class VaSSO(SharpnessAware):
    """``eps = rho d / norm(d)``, ``d <- (1 - theta) d + theta g``, ``u = g_adv``.

    Costs two passes.

    Source: Li and Giannakis 2023, arXiv 2309.15639.

    Args:
        theta: how fast the direction follows the gradients, in (0, 1].
    """

    def __init__(self, base: Base, rho: Radius = 0.05, theta: float = 0.9, **options: Unpack[Options]) -> None:
        super().__init__(base, Rule(sample=Smoothed(theta)), rho, **options)


METHODS: tuple[type[SharpnessAware], ...] = tuple(SharpnessAware.__subclasses__())

for _method in METHODS:
    add_shared_arguments(_method, SharpnessAware)
