"""Per-micro-batch gradients held as factors, and what they make possible."""
