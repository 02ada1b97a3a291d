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
from steppe.pieces.combine import (
    Coupled,
    Damped,
    RememberOrthogonal,
    Rescaled,
    ReuseOrthogonal,
    SearchedSlerp,
    Slerp,
    SurrogateGap,
    Weighted,
)
from steppe.pieces.eigen import Eigen
from steppe.pieces.geometry import (
    Accumulated,
    Adaptive,
    Fisher,
    LossBudget,
    Preconditioned,
    Scaled,
    Unified,
    Unnormalised,
)
from steppe.pieces.rules import BothWeighted, Functional, GradientNorm, Lookbehind
from steppe.pieces.sample import (
    Centralised,
    Filtered,
    Friendly,
    Masked,
    Momentum,
    OnFull,
    Reweighted,
    Smoothed,
)
from steppe.pieces.select import Sharpest
from steppe.pieces.weights import EffectiveSize, Softmax
from steppe.pieces.which import Matrices, Which
from steppe.rule import Every, Rule, WhereSteep
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
        clip_each: clip ``g`` and ``g_adv`` to this norm, each by itself, before they are subtracted: ``max_norm`` of
            the authors' code. ``max_norm`` here clips the whole step once.
    """

    def __init__(
        self,
        base: Base,
        rho: Radius = 0.05,
        gamma: float = 0.9,
        clip_each: float | None = None,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(base, Rule(combine=Weighted(gamma, clip_each)), rho, **options)


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
        if full is None:
            raise TypeError("full must be a closure over the larger batch, got None")
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
    :class:`~steppe.Batch`. Costs two passes where the model factors; else four forwards and three backwards. On noisy
    digits it is as good as m-SAM at ``m = size`` or better; at large radii it may collapse earlier.

    Source: the objective of Luo et al. 2025, arXiv 2509.18001; the weights on both gradients and the size are ours.

    Args:
        size: the effective number of examples, at least 1, found each step (:class:`~steppe.EffectiveSize`); 64 where
            neither it nor ``lam`` is given.
        lam: a fixed inverse temperature in place of ``size``, in units of ``1 / norm(g_i)``, at least 0.
    """

    def __init__(
        self,
        base: Base,
        rho: Radius = 0.05,
        size: float | None = None,
        lam: float | None = None,
        **options: Unpack[Options],
    ) -> None:
        if size is not None and lam is not None:
            raise ValueError(f"size and lam exclude each other: give one, got size={size!r} and lam={lam!r}")
        weights = EffectiveSize(64 if size is None else size) if lam is None else Softmax(lam)
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


class MomentumSAM(SharpnessAware):
    """``eps = -rho v / norm(v)``, ``v`` the base's momentum, ``u = g_adv``.

    Costs one pass. The base must keep a momentum: SGD with momentum, Muon, Adam and its relatives. There is no pass at
    ``w``: ``step`` returns the loss at ``w + eps``, and running statistics are those of ``w + eps``. Before the base's
    first step nothing is perturbed. The authors' code stores the perturbed weights between steps, and applies weight
    decay to these; here the parameters are ``w``, which is what is evaluated, saved and decayed.

    Source: Becker et al. 2024, arXiv 2401.12033; the authors' code.
    """

    def __init__(self, base: Base, rho: Radius = 0.3, **options: Unpack[Options]) -> None:
        super().__init__(base, Rule(sample=Momentum()), rho, **options)


class LESAM(SharpnessAware):
    """``eps = min(sigma / norm(g), rho) g / norm(g)``, ``u = g_adv``: a fixed rise of the loss, not a fixed radius.

    Costs two passes. The paper lets ``sigma`` fall to 0 over its last epochs, along a cosine: ``schedule.Cosine``. Its
    largest radius is not known to us, so ``rho``'s default is our choice.

    Source: Wang et al. 2026, arXiv 2605.10183.

    Args:
        sigma: the rise of the loss to first order, at least 0; a number or a schedule.
    """

    def __init__(self, base: Base, rho: Radius = 0.5, sigma: Radius = 0.35, **options: Unpack[Options]) -> None:
        super().__init__(base, Rule(geometry=LossBudget(sigma)), rho, **options)


class XSAM(SharpnessAware):
    """SAM's ``eps``, ``u = norm(g_adv)`` times a unit vector ``alpha`` of the angle from ``g`` to ``g_adv``.

    Costs two passes and 21 forwards more at every search. ``alpha`` is the one of 0, 0.1, ..., 2 along which the loss
    at ``w + 2 rho`` is the highest: the authors' values. The search needs a :class:`~steppe.Batch`; with a fixed
    ``alpha`` there is none. It is not X-SAM, arXiv 2601.10251.

    Source: arXiv 2603.10048; the authors' code.

    Args:
        alpha: fixed, at least 0; 1 is SAM. ``None`` searches.
        every: how many steps apart the searches are, 400 where it is not given; not beside ``alpha``. The authors
            search once an epoch.
    """

    def __init__(
        self,
        base: Base,
        rho: Radius = 0.15,
        alpha: float | None = None,
        every: int | None = None,
        **options: Unpack[Options],
    ) -> None:
        if alpha is not None and every is not None:
            raise ValueError(f"alpha and every exclude each other: give one, got alpha={alpha!r} and every={every!r}")
        combine = SearchedSlerp(400 if every is None else every) if alpha is None else Slerp(alpha)
        super().__init__(base, Rule(combine=combine), rho, **options)


class SSAM(SharpnessAware):
    """SAM's ``eps``, ``u = norm(g) / norm(g_adv) g_adv``: Stable SAM.

    Costs two passes. Sparse SAM, of the same letters, is another method.

    Source: Tan et al. 2024, arXiv 2401.07250.
    """

    def __init__(self, base: Base, rho: Radius = 0.05, **options: Unpack[Options]) -> None:
        super().__init__(base, Rule(combine=Rescaled()), rho, **options)


class SANER(SharpnessAware):
    """SAM's ``eps``, ``u = (1 - alpha m) g_adv``, ``m`` 1 in the entries with ``0 < g_adv / g < 1``.

    Costs two passes. Made for noisy labels. However small ``rho`` is, about half of the entries are such, so the step
    does not tend to the base's; at ``rho`` 0 it is. The authors let ``alpha`` rise from 0 over their first 50 epochs:
    ``alpha=schedule.Linear(0, 0.5, steps)``.

    Source: Luong et al. 2026, arXiv 2411.17132; the authors' code.

    Args:
        alpha: how much of such entries is taken off, in [0, 1]; a number or a schedule. 0 is SAM.
    """

    def __init__(self, base: Base, rho: Radius = 0.1, alpha: Radius = 0.5, **options: Unpack[Options]) -> None:
        super().__init__(base, Rule(combine=Damped(alpha)), rho, **options)


class LightSAM(SharpnessAware):
    """``eps = rho g / sqrt(s)``, ``s <- s + norm(g)^2``, ``u = g_adv``: a radius by the rule of AdaGrad-Norm.

    Costs two passes. This is LightSAM's ascent; its descent has a step size by the same rule, which here is the base's
    matter. ``rho`` is the first radius, and its default is our choice: the paper's values are not known to us.

    Source: Cheng et al. 2025, arXiv 2505.24399.
    """

    def __init__(self, base: Base, rho: Radius = 0.5, **options: Unpack[Options]) -> None:
        super().__init__(base, Rule(geometry=Accumulated()), rho, **options)


class GAM(SharpnessAware):
    """``u = g + alpha rho H v``, ``H`` and ``v = g / norm(g)`` at ``w + eps``, ``eps`` along the rise of ``norm(g)``.

    Costs four passes. See :class:`~steppe.GradientNorm`. The paper's values are not known to us: the defaults are ours.

    Source: Zhang et al. 2023, arXiv 2303.03108.

    Args:
        alpha: the weight of the second term, at least 0.
    """

    def __init__(self, base: Base, rho: Radius = 0.05, alpha: float = 1.0, **options: Unpack[Options]) -> None:
        super().__init__(base, GradientNorm(alpha), rho, **options)


class ZSharp(SharpnessAware):
    """``eps = rho d / norm(d)``, ``d`` the entries of ``g`` whose z-score in their tensor exceeds its quantile ``q``.

    Costs two passes. As in the paper the norm is over all parameters together. In the authors' code each filtered
    tensor gets the length ``rho`` by itself, so that ``norm(eps)`` grows with their number.

    Source: Yun 2025, arXiv 2505.02369; the authors' code.

    Args:
        q: the share of each tensor's entries that is left out, in [0, 1).
    """

    def __init__(self, base: Base, rho: Radius = 0.05, q: float = 0.95, **options: Unpack[Options]) -> None:
        super().__init__(base, Rule(sample=Filtered(q)), rho, **options)


class GCSAM(SharpnessAware):
    """``eps = rho d / norm(d)``, ``d`` the centralised ``g``, ``u = g_adv``.

    Costs two passes. ``norm(d)`` is the paper's; the authors' code divides by ``norm(g)``. The paper centralises
    ``g_adv`` too, their code does not, and this is the code's.

    Source: Hassan et al. 2025, arXiv 2501.11584; the authors' code.
    """

    def __init__(self, base: Base, rho: Radius = 0.05, **options: Unpack[Options]) -> None:
        super().__init__(base, Rule(sample=Centralised()), rho, **options)


class AESAM(SharpnessAware):
    """SAM where ``norm(g)^2 >= mu + c sigma``, its running mean and deviation; elsewhere the base's own step.

    Costs one pass or two, two where it is SAM. Micro-batches cannot share the pass of ``norm(g)``: SAM costs three with
    ``m=``, and ``1 + 2 sampled m / n`` with ``sampled=``. ``c`` goes from ``start`` to ``end`` over ``steps`` steps;
    the paper's values are not known to us. See :class:`~steppe.WhereSteep`.

    Source: Jiang et al. 2023, arXiv 2304.14647.

    Args:
        start: ``c`` at the first step; lower is more SAM.
        end: ``c`` after ``steps`` steps.
        steps: how many.
        decay: how slowly mean and deviation follow, in [0, 1].
    """

    def __init__(
        self,
        base: Base,
        rho: Radius = 0.05,
        start: float = 0.0,
        end: float = 0.0,
        steps: int = 1,
        decay: float = 0.9,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(base, WhereSteep(Rule(), start, end, steps, decay), rho, **options)


class FunctionalSAM(SharpnessAware):
    """SAM's ``eps``, ``u = J(w + eps)^T grad_F l(F(w))``, ``F`` the model's output and ``J`` its Jacobian.

    Costs two passes. Needs a batch of :meth:`steppe.Batch.supervised`, whose loss is split into model and criterion.
    With the preconditioned perturbation it is ``SharpnessAware(base, Functional(Preconditioned()), rho)``.

    Source: Singh et al. 2025, arXiv 2502.02407.
    """

    def __init__(self, base: Base, rho: Radius = 0.05, **options: Unpack[Options]) -> None:
        super().__init__(base, Functional(), rho, **options)


class PreconditionedSAM(SharpnessAware):
    """``eps = rho M^-1 g / norm(M^-1 g)``, ``M`` the root of the base's second moment, ``u = g_adv``.

    Costs two passes. The base must keep a second moment: Adam and its relatives, RMSprop. We know the paper's method by
    ``eps ~ M^-1 g`` alone; that ``eps`` has the Euclidean length ``rho`` is our choice.

    Source: Singh et al. 2025, arXiv 2502.02407.
    """

    def __init__(self, base: Base, rho: Radius = 0.05, **options: Unpack[Options]) -> None:
        super().__init__(base, Rule(geometry=Preconditioned()), rho, **options)


class EigenSAM(SharpnessAware):
    """``eps = rho (g / norm(g) + alpha sign(<g, v>) v')``, ``v`` the Hessian's top eigenvector, ``v'`` across ``g``.

    Costs two passes and ten more at every hundredth step: 2.1 on average. See :class:`~steppe.Eigen`.

    Source: Luo et al., arXiv 2501.12666; the authors' code.

    Args:
        alpha: the weight of the second term, at least 0.
        every: how many steps apart ``v`` is renewed.
        power: how many steps of power iteration, two passes each.
    """

    def __init__(
        self,
        base: Base,
        rho: Radius = 0.05,
        alpha: float = 0.2,
        every: int = 100,
        power: int = 5,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(base, Rule(geometry=Eigen(alpha, every, power)), rho, **options)


class LookbehindSAM(SharpnessAware):
    """``k`` ascents in a row, each by the gradient where the last one ended, ``u = alpha`` times the sum of the ``k``
    gradients there.

    Costs ``k + 1`` passes. Exact beside SGD without momentum; the authors' fast weights take ``k`` steps of the base:
    :class:`~steppe.Lookbehind`. At a small ``rho`` ``u`` is about ``alpha k g``, at 0 the step is the base's own, ``u =
    g``: a schedule that goes through 0 changes the length of the step by the factor ``alpha k``, 1 by default.

    Source: Mordido et al. 2024, arXiv 2307.16704; the authors' code.

    Args:
        k: how many ascents, at least 1.
        alpha: the share of the way that the weights take, in (0, 1]; ``None`` adapts it for each tensor.
    """

    def __init__(
        self, base: Base, rho: Radius = 0.05, k: int = 2, alpha: float | None = 0.5, **options: Unpack[Options]
    ) -> None:
        super().__init__(base, Lookbehind(k, alpha), rho, **options)


METHODS: tuple[type[SharpnessAware], ...] = tuple(SharpnessAware.__subclasses__())

for _method in METHODS:
    add_shared_arguments(_method, SharpnessAware)
