"""Error against m, the number of examples that share one perturbation."""

from dataclasses import replace

from steppe.lab.recipes import protocol as p
from steppe.lab.recipes.frame import Recipe, Scale, Study
from steppe.lab.settings import Settings


def studies(scale: Scale) -> tuple[Study, ...]:
    """Return SAM at shared radii for every m."""
    if scale == "laptop":
        methods = ("SGD", *_family((0.2, 0.05), 128, 64, 32, 16, 8, 4, 2, 1))
        exact = tuple(f"RWSAM(rho=0.2, lam={lam})" for lam in (0.25, 1.0, 4.0))
        return (
            Study("digits", p.NOISY_DIGITS, methods),
            Study("digits-1000", Settings(), methods + exact, seeds=10),
        )
    if scale == "gpu-hour":
        return (Study("cifar10-resnet18", replace(p.HOUR, epochs=10), ("SGD", *_family((0.05,), 128, 64, 32, 16)), 3),)
    return (Study("cifar10-resnet18", p.CIFAR10, (p.VANILLA, *_family((0.05, 0.1), 128, 64, 32, 16, 8)), seeds=5),)


def _family(radii: tuple[float, ...], *sizes: int) -> tuple[str, ...]:
    return tuple(f"SAM(rho={rho}, m={m})" for rho in radii for m in sizes)


RECIPE = Recipe(
    "m_sharpness",
    "Does error fall with m, and how far down?",
    "SAM (arXiv 2010.01412), section 4.1; RW-SAM (arXiv 2509.18001)",
    (
        ("known", "smaller m generalises better at the same rho; 64 is the m that RW-SAM's authors match"),
        ("data, net, radii, seeds", f"{p.NOT_KNOWN} in full; here CIFAR-10 and ResNet-18 with WSAM's training"),
        ("numbers", p.NOT_KNOWN),
        ("batch norm", "mixes examples, so micro-batches run one after the other in nets that have it"),
        ("smaller scales", "the digits with 40 % label noise; digits-1000 is the table of docs/m-sam.md; " + p.LAPTOP),
    ),
    studies,
)
