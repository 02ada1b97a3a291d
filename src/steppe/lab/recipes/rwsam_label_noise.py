"""RW-SAM under label noise."""

from collections.abc import Mapping
from dataclasses import replace

from steppe.lab.recipes import protocol as p
from steppe.lab.recipes.frame import Recipe, Scale, Study
from steppe.lab.recipes.rwsam_classification import EIGEN, RWSAM
from steppe.lab.settings import Settings
from steppe.lab.sweep.space import Stage, Value

METHODS = ("SGD", p.VANILLA, p.SAM, RWSAM)
STAGES = (p.RHO_STAGE, Stage("RWSAM", RWSAM, {"lam": (0.25, 0.5, 1.0, 2.0)}))
TABLE = {  # accuracies of SGD, SAM and RW-SAM
    0.2: (87.54, 90.01, 90.34),
    0.4: (83.66, 86.40, 86.87),
    0.6: (76.64, 78.79, 81.52),
    0.8: (46.53, 37.69, 53.17),
}


def studies(scale: Scale) -> tuple[Study, ...]:
    """Return a comparison for each level of noise."""
    if scale == "gpu-hour":
        hour = replace(p.HOUR, batch_size=256, noise=0.4)
        return (_study(0.4, hour, 3, {"rho": 0.1, "lam": 0.5}, ()),)
    laptop = scale == "laptop"
    settings = p.NOISY_DIGITS if laptop else EIGEN
    stages = p.on_digits(STAGES, rho=(0.05, 0.1, 0.2, 0.5), lam=(0.25, 1.0, 4.0)) if laptop else STAGES
    levels = (0.4, 0.8) if laptop else tuple(TABLE)
    return tuple(_study(level, replace(settings, noise=level), 5, {}, stages) for level in levels)


def _study(
    level: float, settings: Settings, seeds: int, values: Mapping[str, Value], stages: tuple[Stage, ...]
) -> Study:
    errors = (round(100 - right, 2) for right in TABLE[level])
    table = dict(zip(("SGD", p.SAM, RWSAM), errors, strict=True))
    share = p.THIRD if settings.data == "digits" else 0.1
    return Study(
        f"noise-{level}", settings, METHODS, seeds, values, stages, search_seeds=2, held_out=share, published=table
    )


RECIPE = Recipe(
    "rwsam_label_noise",
    "Does RW-SAM resist wrong labels better than SAM, most of all at 80 %?",
    "RW-SAM (arXiv 2509.18001), Table 4, as reported in published reading notes",
    (
        ("noise", "20, 40, 60 and 80 %; whether symmetric " + p.NOT_KNOWN),
        ("data and net", f"{p.NOT_KNOWN}; here CIFAR-10 and ResNet-18"),
        (
            "training, rho, lambda",
            f"{p.NOT_KNOWN}; here those of the same group's Eigen-SAM code, rho and lambda searched",
        ),
        ("numbers", "known; n and spread not known"),
        ("smaller scales", "laptop: 40 and 80 %; " + p.LAPTOP),
    ),
    studies,
    "the paper's own data, which the source does not name",
)
