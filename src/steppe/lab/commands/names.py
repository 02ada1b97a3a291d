"""The names that shells complete, which are answered without importing torch.

A test holds the tables against what the laboratory knows.
"""

from collections.abc import Callable, Iterable

DATA = ("digits", "fashion-mnist", "cifar10", "cifar100")
MODELS = ("mlp-256-256", "cnn-16", "resnet18", "wrn28-10-gn", "vit-s4")
METHODS = (
    "SGD", "AdamW", "SAM", "USAM", "UnifiedSAM", "ASAM", "FisherSAM", "GSAM", "ESAM", "WSAM", "CoupledWSAM", "NSAM",
    "RWSAM", "ReweightedSharpness", "LookSAM", "FSAM", "VaSSO", "MomentumSAM", "LESAM", "XSAM", "SSAM", "ZSharp",
    "GCSAM", "AESAM", "FunctionalSAM", "PreconditionedSAM", "EigenSAM", "LookbehindSAM", "AdaptiveWSAM", "FisherWSAM",
)  # fmt: skip
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
