"""A damaged or hostile CIFAR file gives arrays or one error line, and nothing else.

``python -m tests.lab.test_cifar_fuzz 100000`` tries more files than the suite does.
"""

import os
import pickle
import random
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from steppe.lab.data import cifar
from steppe.lab.errors import LabError

KEY = "fine_labels"


def originals() -> list[bytes]:
    """Return well-formed files in the protocols that writers have used."""
    data = np.arange(3 * 3072, dtype=np.uint8).reshape(3, 3072)
    found = {b"data": data, KEY.encode(): [1, 2, 3], b"filenames": [b"a.png"] * 3}
    return [pickle.dumps(found, protocol=p) for p in (0, 2, 4, 5)] + [
        pickle.dumps(found | {b"data": np.asfortranarray(data)}, protocol=2)
    ]


def mutant(whole: bytes, draw: random.Random) -> bytes:
    """Return the file with some bytes changed, put in, cut out or repeated, mostly where the opcodes are."""
    text = bytearray(whole)
    for _ in range(draw.choice((1, 1, 2, 4, 16))):
        near = draw.choice((40, 200, len(text)))
        start = draw.randrange(max(1, min(near, len(text))))
        at = start if draw.random() < 0.7 else max(0, len(text) - 1 - draw.randrange(120))
        kind = draw.randrange(4)
        if kind == 0 and text:
            text[at % len(text)] = draw.randrange(256)
        elif kind == 1:
            text[at:at] = bytes(draw.randrange(256) for _ in range(draw.randrange(1, 6)))
        elif kind == 2:
            del text[at : at + draw.randrange(1, 9)]
        else:
            text[at:at] = text[start : start + draw.randrange(1, 30)]
    return bytes(text)


def outcomes(folder: Path, count: int, seed: int) -> Counter[str]:
    """Return what reading so many mutants gave."""
    draw, wholes, seen, path = random.Random(seed), originals(), Counter[str](), folder / "train"
    for _ in range(count):
        path.write_bytes(mutant(draw.choice(wholes), draw))
        try:
            images, labels = cifar._batch(path, KEY)
        except LabError:
            seen["refused"] += 1
        else:
            right = images.shape[1:] == (3, 32, 32) and labels.dim() == 1
            seen["read" if right else f"read as {images.shape}, {labels.shape}"] += 1
    return seen


@pytest.mark.skipif(not hasattr(os, "fork"), reason="a crash is caught in a process of its own")
def test_mutated_files_are_read_or_refused(tmp_path: Path) -> None:
    child = os.fork()
    if child == 0:
        code = 1
        try:
            seen = outcomes(tmp_path, 1000, seed=0)
            code = 0 if set(seen) == {"read", "refused"} and min(seen.values()) > 10 else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


if __name__ == "__main__":
    where = Path(sys.argv[2] if len(sys.argv) > 2 else ".")
    print(outcomes(where, int(sys.argv[1]), seed=1))
