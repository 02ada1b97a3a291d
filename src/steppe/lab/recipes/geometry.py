"""WSAM and SAM, each with the plain, ASAM's and Fisher SAM's neighbourhood."""

from dataclasses import replace

from steppe.lab.recipes import protocol as p
from steppe.lab.recipes.frame import Recipe, Scale, Study
from steppe.lab.sweep.space import Stage

ASAM, FISHER = "ASAM(rho={rho_asam})", "FisherSAM(rho={rho_fisher})"
ADAPTIVE_WSAM = "AdaptiveWSAM(rho={rho_asam}, gamma={gamma_asam})"
FISHER_WSAM = "FisherWSAM(rho={rho_fisher}, gamma={gamma_fisher})"
METHODS = (p.SAM, p.WSAM, ASAM, ADAPTIVE_WSAM, FISHER, FISHER_WSAM)
RHO = (0.1, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 4.5, 5.0, 5.5, 6.0)
GAMMA = (0.8, 0.82, 0.84, 0.86, 0.88, 0.9, 0.92, 0.94)
STAGES = (
    p.RHO_STAGE,
    p.WSAM_STAGE,
    Stage("ASAM", ASAM, {"rho_asam": RHO}),
    Stage("AdaptiveWSAM", ADAPTIVE_WSAM, {"gamma_asam": GAMMA}),
    Stage("Fisher", FISHER, {"rho_fisher": RHO}),
    Stage("FisherWSAM", FISHER_WSAM, {"gamma_fisher": GAMMA}),
)
COARSE = {
    "rho": (0.05, 0.1, 0.2, 0.5),
    "rho_asam": (0.5, 1.0, 2.0, 4.0),
    "rho_fisher": (0.1, 0.5, 1.0, 2.0),
    "gamma": p.FEW,
    "gamma_asam": p.FEW,
    "gamma_fisher": p.FEW,
}
FOUND = {**p.EXAMPLE, "rho_asam": 5.0, "rho_fisher": 5.0, "gamma_asam": 0.88, "gamma_fisher": 0.88}


def studies(scale: Scale) -> tuple[Study, ...]:
    """Return the six methods on one data set."""
    if scale == "laptop":
        coarse = p.on_digits(STAGES, **COARSE)
        return (Study("digits", p.NOISY_DIGITS, METHODS, stages=coarse, search_seeds=2, held_out=p.THIRD),)
    if scale == "gpu-hour":
        return (Study("cifar10-resnet18", replace(p.HOUR, epochs=12), METHODS, seeds=3, values=FOUND),)
    return (Study("cifar10-wrn28-10", p.wide(p.CIFAR10), METHODS, seeds=5, values=p.EXAMPLE, stages=STAGES),)


RECIPE = Recipe(
    "geometry",
    "Does WSAM gain from an adaptive neighbourhood?",
    "WSAM (arXiv 2305.15817), Table 7",
    (
        ("data and net", "CIFAR-10, WRN-28-10, as in Table 2"),
        ("search", "rho from 0.1, 0.5, 1.0, ..., 6.0: best 5.0 for ASAM and Fisher; gamma 0.80 to 0.94: best 0.88"),
        ("lr, weight decay", f"{p.NOT_KNOWN}; here lr 0.1 and 5e-4"),
        ("numbers", f"{p.NOT_KNOWN}; said of them: plain WSAM is best, and its authors advise it"),
        ("smaller scales", "coarser grids on the digits with 40 % label noise; " + p.LAPTOP),
    ),
    studies,
)
