"""Per-micro-batch gradients held as factors, and what they make possible."""

from steppe.factored.statistics import GradientStatistics, gradient_statistics

__all__ = ["GradientStatistics", "gradient_statistics"]
