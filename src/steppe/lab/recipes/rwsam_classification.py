"""RW-SAM against SAM and SGD on images."""

from dataclasses import replace

from steppe.lab.recipes import protocol as p
from steppe.lab.recipes.frame import Recipe, Scale, Study
from steppe.lab.settings import Settings
from steppe.lab.sweep.space import Stage

RWSAM = "RWSAM(rho={rho}, lam={lam})"
METHODS = ("SGD", p.VANILLA, p.SAM, RWSAM)
STAGES = (p.RHO_STAGE, Stage("RWSAM", RWSAM, {"lam": (0.1, 0.25, 0.5, 1.0, 2.0, 4.0)}))
EIGEN = replace(p.CIFAR10, batch_size=256)  # the same group's Eigen-SAM code: lr 0.1, 5e-4, 200 epochs, rho 0.1
VALUES = {"rho": 0.1, "lam": 0.5}
# accuracies of SGD, SAM and RW-SAM
TABLE = {
    ("cifar10", "resnet18"): (95.62, 95.99, 96.24),
    ("cifar10", "resnet50"): (95.64, 96.06, 96.34),
    ("cifar10", "wrn28-10"): (96.47, 96.91, 97.11),
    ("cifar100", "resnet18"): (78.91, 78.90, 79.31),
    ("cifar100", "resnet50"): (79.55, 80.31, 80.83),
    ("cifar100", "wrn28-10"): (81.55, 83.25, 83.52),
    ("imagenet", "resnet50"): (76.67, 77.16, 77.37),
}


def published(data: str, model: str) -> dict[str, float]:
    """Return the paper's test errors in per cent."""
    return {text: round(100 - right, 2) for text, right in zip(("SGD", p.SAM, RWSAM), TABLE[data, model], strict=True)}


def studies(scale: Scale) -> tuple[Study, ...]:
    """Return the comparison on each data set and net."""
    if scale == "laptop":
        table = published("cifar10", "resnet18")
        return (
            Study("digits", p.CLEAN_DIGITS, METHODS, 5, {}, STAGES, search_seeds=2, held_out=p.THIRD, published=table),
            Study("digits-same-rho", p.CLEAN_DIGITS, METHODS, 5, VALUES, published=table),
        )
    if scale == "gpu-hour":
        hour = replace(p.HOUR, batch_size=256)
        return (Study("cifar10-resnet18", hour, METHODS, 3, values=VALUES, published=published("cifar10", "resnet18")),)
    return tuple(
        Study(f"{data}-{model}", _settings(data, model), METHODS, stages=STAGES, published=published(data, model))
        for data, model in TABLE
    )


def _settings(data: str, model: str) -> Settings:
    return p.IMAGENET if data == "imagenet" else replace(EIGEN, data=data, model=model)


RECIPE = Recipe(
    "rwsam_classification",
    "Does weighting examples by their gradient norms in the perturbation lower the error?",
    "RW-SAM (arXiv 2509.18001), as reported in published reading notes",
    (
        ("nets and data", "ResNet-18, ResNet-50, WRN-28-10 on CIFAR-10 and CIFAR-100; ResNet-50 on ImageNet"),
        ("rho, lr, weight decay, batch, epochs", f"{p.NOT_KNOWN}; here those of the same group's Eigen-SAM code"),
        ("lambda and the probe's length", f"{p.NOT_KNOWN}; here lambda is searched, norms exact where the net factors"),
        ("numbers", "known, one decimal place more than our seeds resolve; n and spread not known"),
        ("smaller scales", p.LAPTOP),
    ),
    studies,
    "the paper's own data and net (laptop and gpu-hour: CIFAR-10, ResNet-18)",
)
