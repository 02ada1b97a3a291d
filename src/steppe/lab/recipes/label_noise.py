"""WSAM under symmetric label noise, searched anew for each level."""

from dataclasses import replace

from steppe.lab.recipes import protocol as p
from steppe.lab.recipes.frame import Recipe, Scale, Study

METHODS = (p.VANILLA, p.SAM, p.ESAM, p.GSAM, p.WSAM)
STAGES = (p.RHO_STAGE, p.ESAM_STAGE, p.GSAM_STAGE, p.WSAM_STAGE)
GIVEN = {"esam_beta": 0.5, "esam_gamma": 0.5, "alpha": 0.1}  # laptop: the middle of their grids
LEVELS = (0.2, 0.4, 0.6, 0.8)
CIFAR10 = replace(p.CIFAR10, lr=0.05, weight_decay=1e-3)


def studies(scale: Scale) -> tuple[Study, ...]:
    """Return a comparison for each level of noise."""
    if scale == "laptop":
        coarse = p.on_digits((p.RHO_STAGE, p.WSAM_STAGE), rho=(0.05, 0.1, 0.2, 0.5), gamma=p.FEW)
        noisy = {f"noise-{level}": replace(p.NOISY_DIGITS, noise=level) for level in LEVELS}
        return tuple(
            Study(name, each, METHODS, values=GIVEN, stages=coarse, search_seeds=2, held_out=p.THIRD)
            for name, each in noisy.items()
        )
    if scale == "gpu-hour":
        hour = replace(p.HOUR, lr=0.05, weight_decay=1e-3, noise=0.4)
        values = {**p.EXAMPLE, "lr": 0.05, "weight_decay": 1e-3}
        return (Study("noise-0.4", hour, METHODS, seeds=3, values=values),)
    return tuple(
        Study(f"noise-{level}", replace(CIFAR10, noise=level), METHODS, seeds=5, stages=STAGES) for level in LEVELS
    )


RECIPE = Recipe(
    "label_noise",
    "Which method resists wrong labels best?",
    "WSAM (arXiv 2305.15817), Tables 5 and 6",
    (
        ("data and net", "CIFAR-10 with 20, 40, 60 and 80 % symmetric noise, ResNet-18"),
        ("training", "SGD momentum 0.9, cosine, 200 epochs, batch 128, lr 0.05, weight decay 1e-3"),
        ("seeds", f"{p.NOT_KNOWN}; here 5"),
        ("epochs of vanilla", f"{p.NOT_KNOWN} for these tables; here twice the others', as in Table 2"),
        ("search", "rho for each level of noise; the others' grids as in Table 2"),
        ("numbers", f"{p.NOT_KNOWN}; said of them: WSAM is usually better than SAM, ESAM and GSAM"),
        ("validation labels", "noisy, as the training labels: a search has no clean ones"),
        ("smaller scales", "laptop: rho and WSAM's gamma searched, coarsely; " + p.LAPTOP),
    ),
    studies,
)
