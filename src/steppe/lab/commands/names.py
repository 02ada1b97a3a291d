"""The names that shells complete, which are answered without importing torch.

A test holds the tables against what the laboratory knows.
"""

import ast
from collections.abc import Callable, Iterable
from importlib.resources import files


def _methods() -> list[str]:
    """Return the methods that ``steppe.api`` imports, read from its text."""
    tree = ast.parse((files("steppe") / "api.py").read_text(encoding="utf-8"))
    found = [node for node in tree.body if isinstance(node, ast.ImportFrom) and node.module == "steppe.methods"]
    return [alias.name for node in found for alias in node.names if alias.name != "METHODS"]


DATA = ("digits", "fashion-mnist", "cifar10", "cifar100")
MODELS = ("mlp-256-256", "cnn-16", "resnet18", "wrn28-10-gn", "vit-s4")
METHODS = ("SGD", "AdamW", *_methods(), "AdaptiveWSAM", "FisherWSAM", "LateSAM")
RECIPES = (
    "wsam_classification", "wsam_finetune", "label_noise", "geometry", "decoupling", "minima", "gamma_sensitivity",
    "m_sharpness", "rwsam_classification", "rwsam_finetune", "rwsam_label_noise", "cost",
)  # fmt: skip
SCALES = ("paper", "laptop")
DEVICES = ("auto", "cpu", "cuda", "mps")
STRATEGIES = ("ddp", "fsdp")
PRECISIONS = ("fp32", "bf16")
EQUAL = ("passes", "seconds", "epochs")


def completed(names: Iterable[str]) -> Callable[[str], list[str]]:
    """Return what Typer completes an option or argument by: the names that begin with what is written."""

    def matching(incomplete: str) -> list[str]:
        return [name for name in names if name.startswith(incomplete)]

    return matching
