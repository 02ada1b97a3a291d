"""The tables of docs/theory.md are those of the record."""

import json
from pathlib import Path
from statistics import mean, stdev

DOCS = Path(__file__).parents[2] / "docs"


def test_the_table_of_drifts_is_that_of_the_record():
    text = (DOCS / "theory.md").read_text()
    rows = [
        row for seed in json.loads((DOCS / "records" / "sde_digits.json").read_text())["drift"].values() for row in seed
    ]
    for case in {(row["rule"], row["epochs"], row["rho"]) for row in rows}:
        start = text.index("| " + " | ".join(map(str, case)) + " |")
        found = text[start:].splitlines()
        for line, key, digits in ((found[0], "cosine", 3), (found[1], "relative_error", 2)):
            cells = []
            for m in (64, 16, 4, 1):
                values = [r[key] for r in rows if (r["rule"], r["epochs"], r["rho"], r["m"]) == (*case, m)]
                cells.append(f"{mean(values):.{digits}f} ± {stdev(values):.{digits}f}")
            assert line.endswith("| " + " | ".join(cells) + " |")
