"""WSAM's error over gamma, all else fixed."""

from dataclasses import replace

from steppe.lab.recipes import protocol as p
from steppe.lab.recipes.frame import Recipe, Scale, Study

METHODS = (p.VANILLA, p.SAM, *(f"WSAM(rho={{rho}}, gamma={gamma})" for gamma in p.GAMMA))
FEW = (p.VANILLA, p.SAM, *(f"WSAM(rho={{rho}}, gamma={gamma})" for gamma in (0.5, 0.8, 0.9, 0.95)))
STAGES = (p.BASE_STAGE, p.RHO_STAGE)


def studies(scale: Scale) -> tuple[Study, ...]:
    """Return one method a gamma."""
    if scale == "laptop":
        radii, gammas = (0.1, 0.2, 0.5), (0.5, 0.7, 0.8, 0.86, 0.9, 0.94)
        grid = tuple(f"WSAM(rho={rho}, gamma={gamma})" for rho in radii for gamma in gammas)
        return (Study("digits", p.NOISY_DIGITS, ("SGD", *(f"SAM(rho={rho})" for rho in radii), *grid)),)
    if scale == "gpu-hour":
        return (Study("cifar10-resnet18", replace(p.HOUR, epochs=12), FEW, seeds=3, values=p.EXAMPLE),)
    settings = {"cifar10-resnet18": p.CIFAR10, "cifar10-wrn28-10": p.wide(p.CIFAR10)}
    settings |= {"cifar100-resnet18": p.CIFAR100, "cifar100-wrn28-10": p.wide(p.CIFAR100)}
    return tuple(Study(name, each, METHODS, seeds=5, stages=STAGES) for name, each in settings.items())


RECIPE = Recipe(
    "gamma_sensitivity",
    "How much does WSAM's error depend on gamma?",
    "WSAM (arXiv 2305.15817), Figure 3",
    (
        ("protocol", "as Table 2, gamma over a wide range"),
        ("numbers", f"{p.NOT_KNOWN}; said of them: the best is almost always in [0.8, 0.95]"),
        ("smaller scales", "laptop: gamma at three radii, the digits with 40 % label noise; " + p.LAPTOP),
    ),
    studies,
)
