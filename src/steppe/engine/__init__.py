"""How a step is carried out: passes, moved weights, ranks, scalers. No user imports it."""
