"""WSAM's sharpness term beside the base optimizer, against the same term through it."""

from steppe.lab.recipes import protocol as p
from steppe.lab.recipes.frame import Recipe, Scale, Study

METHODS = (p.VANILLA, p.SAM, p.COUPLED, p.WSAM)
STAGES = (p.BASE_STAGE, p.RHO_STAGE, p.COUPLED_STAGE, p.WSAM_STAGE)
FEW = (0.5, 0.6, 0.7, 0.8, 0.88, 0.92)


def studies(scale: Scale) -> tuple[Study, ...]:
    """Return vanilla, SAM and both WSAMs."""
    if scale == "laptop":
        coarse = p.on_digits(STAGES[1:], gamma=FEW, coupled_gamma=FEW)
        return (Study("digits", p.NOISY_DIGITS, METHODS, seeds=10, stages=coarse, search_seeds=2, held_out=p.THIRD),)
    if scale == "gpu-hour":
        return (Study("cifar10-resnet18", p.HOUR, METHODS, seeds=3, values=p.EXAMPLE),)
    settings = {"cifar10-resnet18": p.CIFAR10, "cifar10-wrn28-10": p.wide(p.CIFAR10)}
    settings |= {"cifar100-resnet18": p.CIFAR100, "cifar100-wrn28-10": p.wide(p.CIFAR100)}
    return tuple(Study(name, each, METHODS, seeds=5, stages=STAGES) for name, each in settings.items())


RECIPE = Recipe(
    "decoupling",
    "Is the sharpness term better beside the base optimizer (WSAM) than through it (Coupled-WSAM)?",
    "WSAM (arXiv 2305.15817), Table 8",
    (
        ("protocol", "as Table 2; gamma searched for each of the two"),
        ("numbers", f"{p.NOT_KNOWN}; said of them: Coupled above SAM in most cases, WSAM above Coupled in most"),
        ("a caution", "beside momentum 0.9 the same gamma weighs ten times more through the base than past it"),
        ("smaller scales", "coarser grids on the digits with 40 % label noise; " + p.LAPTOP),
    ),
    studies,
)
