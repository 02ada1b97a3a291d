"""Short texts from Debian's package ``fortunes``: fortune cookies, classified by the file they come from."""

from pathlib import Path

import torch

from steppe.lab.data.raw import RawData, Texts
from steppe.lab.errors import LabError

FORTUNES = Path("/usr/share/games/fortunes")  # where the package puts them
CLASSES = ("computers", "definitions", "people", "politics", "science", "songs-poems", "work", "zippy")
_EACH, _CHARACTERS = 200, 200  # texts of each file, and their greatest length: small enough for two cores


def fortunes(folder: Path) -> RawData:
    """Read 200 short texts from each of eight files; there is no fixed test set, each seed holds out its own."""
    texts: Texts = []
    labels: list[int] = []
    for label, name in enumerate(CLASSES):
        path = folder / name
        if not path.is_file():
            raise LabError(f"no {name} in {folder}")
        parts = [part.strip() for part in path.read_text(encoding="utf-8", errors="replace").split("\n%\n")]
        found = [(part,) for part in parts if 0 < len(part) <= _CHARACTERS][:_EACH]
        texts += found
        labels += [label] * len(found)
    return RawData(texts, torch.tensor(labels), None, None, len(CLASSES))
