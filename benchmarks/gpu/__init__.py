"""Everything that is to be tried on a GPU, as small jobs: ``python -m benchmarks.gpu --device cuda --out gpu``."""
