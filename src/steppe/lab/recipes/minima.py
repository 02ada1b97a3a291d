"""Loss and sharpness where SGD, SAM and WSAM end."""

from steppe.lab.recipes import protocol as p
from steppe.lab.recipes.frame import Recipe, Scale, Study
from steppe.lab.settings import Settings

METHODS = ("SGD", p.SAM, p.WSAM)


def studies(scale: Scale) -> tuple[Study, ...]:
    """Return the runs whose ends are measured."""
    if scale == "laptop":
        return (Study("digits", Settings(), METHODS, values={"rho": 0.5, "gamma": 0.9}),)
    if scale == "gpu-hour":
        return (Study("cifar10-resnet18", p.HOUR, METHODS, seeds=3, values=p.EXAMPLE),)
    return (Study("cifar10-resnet18", p.CIFAR10, METHODS, seeds=5, values=p.EXAMPLE),)


RECIPE = Recipe(
    "minima",
    "Is WSAM's minimum as flat as SAM's, at a lower loss?",
    "WSAM (arXiv 2305.15817), Table 9",
    (
        ("measured", "training loss and top Hessian eigenvalue, by power iteration"),
        ("data, net, iterations, batch-norm mode", p.NOT_KNOWN),
        (
            "numbers",
            f"{p.NOT_KNOWN}; said: vanilla low loss and sharp, SAM higher and flat, WSAM near SAM at less loss",
        ),
        ("smaller scales", "1,000 digits with 40 % label noise, `steppe compare`'s protocol; " + p.LAPTOP),
    ),
    studies,
    measured=True,
)
