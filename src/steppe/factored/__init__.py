"""Per-micro-batch gradients held as factors, and what they make possible.

For ``y = W a`` the gradient of micro-batch ``k`` is ``G_k = sum of delta a^T`` over its rows, so the inputs ``a`` and
output gradients ``delta`` of one ordinary pass over the whole batch hold every ``G_k``. From them follow exact norms,
and a second pass in which each micro-batch goes through ``W + eps_k``: m-SAM in two passes for every ``m``, exact to
rounding.
"""

from steppe.factored.black_box import register_factored
from steppe.factored.statistics import GradientStatistics, gradient_statistics

__all__ = ["GradientStatistics", "gradient_statistics", "register_factored"]
