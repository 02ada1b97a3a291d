"""The four slots of a method: sample, geometry, select, combine. Each piece is one line of a paper."""
