"""RW-SAM against SAM in fine-tuning a pre-trained transformer."""

from dataclasses import replace

from steppe.lab.recipes import protocol as p
from steppe.lab.recipes.frame import Recipe, Scale, Study
from steppe.lab.recipes.rwsam_classification import RWSAM
from steppe.lab.recipes.wsam_finetune import DIGITS, HOUR
from steppe.lab.sweep.space import Stage

METHODS = ("SGD", p.SAM, RWSAM)
TABLE = {"cifar10": (98.24, 98.40, 98.58), "cifar100": (88.71, 89.63, 89.89)}  # accuracies, ViT-B/16
VIT = replace(p.CIFAR10, model="hf:vit-b16", epochs=10, lr=0.01, weight_decay=0.0)
STAGES = (p.RHO_STAGE, Stage("RWSAM", RWSAM, {"lam": (0.25, 0.5, 1.0, 2.0)}))


def studies(scale: Scale) -> tuple[Study, ...]:
    """Return the fine-tuning on each data set."""
    errors = {data: tuple(round(100 - right, 2) for right in row) for data, row in TABLE.items()}
    tables = {data: dict(zip(METHODS, row, strict=True)) for data, row in errors.items()}
    if scale == "laptop":
        return (Study("digits", DIGITS, METHODS, 5, {}, STAGES, 2, p.THIRD, published=tables["cifar10"]),)
    if scale == "gpu-hour":
        values = {"rho": 0.1, "lam": 0.5}
        return (Study("cifar10-resnet18", HOUR, METHODS, 3, values=values, published=tables["cifar10"]),)
    return tuple(
        Study(f"{data}-vit", replace(VIT, data=data), METHODS, stages=STAGES, published=table)
        for data, table in tables.items()
    )


RECIPE = Recipe(
    "rwsam_finetune",
    "Does RW-SAM help where a pre-trained net is fine-tuned?",
    "RW-SAM (arXiv 2509.18001), as reported in published reading notes",
    (
        ("net and data", "ViT-B/16, pre-trained, on CIFAR-10 and CIFAR-100; bring a folder vit-b16 of transformers"),
        ("base optimizer, lr, epochs, batch, rho, lambda", f"{p.NOT_KNOWN}; here SGD, lr 0.01, 10 epochs: our choice"),
        ("GLUE", f"reported there too; its numbers are {p.NOT_KNOWN} and it is left out"),
        ("smaller scales", "the start is SGD on the same data; " + p.LAPTOP),
    ),
    studies,
    "ViT-B/16 on the paper's data (laptop and gpu-hour: CIFAR-10)",
)
