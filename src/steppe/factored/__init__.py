"""Per-example and per-micro-batch gradients from the activations and output gradients of one pass.

For a layer ``y = W a`` the gradient of micro-batch ``k`` is ``G_k = sum delta a^T`` over its rows. So the inputs ``a``
and the output gradients ``delta`` of one pass over the whole batch hold every ``G_k``, as in Opacus (arXiv 2109.12298)
and BackPACK (arXiv 1912.10985). Norms come from Gram matrices, ``norm(G_k)^2 = sum (A_k A_k^T) * (D_k D_k^T)``, without
any ``G_k`` ("ghost norms": Goodfellow 2015, arXiv 1510.01799; Li et al. 2022, arXiv 2110.05679). A second pass
evaluates each micro-batch at ``W + eps_k``: m-SAM in two passes for every ``m``, exact to rounding.

From the top: :mod:`~steppe.factored.engine` answers the oracle; :mod:`~steppe.factored.rehearsal` proves a model on
real data, and :mod:`~steppe.factored.plans` remembers the verdict; :mod:`~steppe.factored.shared` runs the two passes
of :mod:`~steppe.factored.passes`; :mod:`~steppe.factored.sites` finds every use of a parameter;
:mod:`~steppe.factored.layers` is the table of what each torch function records and how it is perturbed;
:mod:`~steppe.factored.maps` and :mod:`~steppe.factored.gradients` are the mathematics. ``docs/m-sam.md`` follows a
layer from the formula to the code.
"""

from steppe.factored.composites import register_factored
from steppe.factored.statistics import GradientStatistics, gradient_statistics

__all__ = ["GradientStatistics", "gradient_statistics", "register_factored"]
