"""Settings, grids and stages that several recipes share; sources in the recipes."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from steppe.lab.recipes.recipe import Study
from steppe.lab.settings import Settings
from steppe.lab.sweep.space import Stage, Value

UNREAD = "not transcribed"
START = "start in the folder of examples/large_images.py"

# WSAM's grids (arXiv 2305.15817, section on image classification)
GAMMA = (0.5, 0.6, 0.7, 0.8, 0.82, 0.84, 0.86, 0.88, 0.9, 0.92, 0.94, 0.96)
HIGH_GAMMA = (0.8, 0.82, 0.84, 0.86, 0.88, 0.9, 0.92, 0.94)
LARGE_RHO = (0.1, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 4.5, 5.0, 5.5, 6.0)
SHARE = (0.4, 0.5, 0.6)  # ESAM's beta and gamma

VANILLA = "SGD(epochs=2x)"
SAM = "SAM(rho={rho})"
WSAM = "WSAM(rho={rho}, gamma={gamma})"
COUPLED = "CoupledWSAM(rho={rho}, gamma={coupled_gamma})"
GSAM = "GSAM(rho={rho}, alpha={alpha})"
ESAM = "ESAM(rho={rho}, beta={esam_beta}, gamma={esam_gamma})"
RWSAM = "RWSAM(rho={rho}, lam={lam})"

BASE_STAGE = Stage("base", VANILLA, {"lr": (0.05, 0.1), "weight_decay": (1e-4, 5e-4, 1e-3)})
RHO_STAGE = Stage("radius", SAM, {"rho": (0.01, 0.02, 0.05, 0.1, 0.2, 0.5)})
WSAM_STAGE = Stage("WSAM", WSAM, {"gamma": GAMMA})
COUPLED_STAGE = Stage("CoupledWSAM", COUPLED, {"coupled_gamma": GAMMA})
GSAM_STAGE = Stage("GSAM", GSAM, {"alpha": (0.01, 0.02, 0.03, 0.1, 0.2, 0.3)})
ESAM_STAGE = Stage("ESAM", ESAM, {"esam_beta": SHARE, "esam_gamma": SHARE})

EXAMPLE = {"lr": 0.1, "weight_decay": 5e-4, "rho": 0.2, "gamma": 0.9}  # of WSAM's code: ResNet-18, CIFAR-10

CIFAR10 = Settings(
    "cifar10", train_size=50_000, noise=0.0, model="resnet18", epochs=200, batch_size=128, lr=0.1, weight_decay=5e-4
)
WIDE = replace(CIFAR10, model="wrn28-10", batch_size=256)  # WSAM's authors train it with batches of 256
IMAGENET = replace(  # in files: examples/large_images.py reads them
    CIFAR10, data="large_images:imagenet", train_size=1_281_167, model="resnet50", epochs=90, batch_size=256,
    augment="resized-crop-flip", image_size=224,
)  # fmt: skip

# Embedded data for two cores: one test set for all seeds, which searches never see. A tenth of 600 examples would be
# too few to tell points apart, so searches hold out a third.
THIRD = round(1 / 3, 4)
FEW = (0.5, 0.7, 0.8, 0.88)  # of gamma
FEW_RHO = (0.05, 0.1, 0.2, 0.5)
NOISY_DIGITS = Settings(train_size=600, model="mlp-128-128", epochs=80, test_seed=0)
CLEAN_DIGITS = replace(NOISY_DIGITS, noise=0.0, batch_size=64, weight_decay=1e-3)
FURTHER_DIGITS = replace(NOISY_DIGITS, noise=0.2, epochs=10, lr=0.005, start="SGD(epochs=80)")
LAPTOP = "scikit-learn's digits, MLP 64-128-128-10"


def four(methods: tuple[str, ...], stages: tuple[Stage, ...]) -> tuple[Study, ...]:
    """Return WSAM's four pairs of data set and net."""
    nets = {"resnet18": CIFAR10, "wrn28-10": WIDE}
    return tuple(
        Study(f"{data}-{name}", replace(net, data=data), methods, stages=stages)
        for data in ("cifar10", "cifar100")
        for name, net in nets.items()
    )


def digits(
    methods: tuple[str, ...],
    stages: tuple[Stage, ...],
    settings: Mapping[str, Settings] | None = None,
    grids: Mapping[str, tuple[Value, ...]] | None = None,
    **more: Any,
) -> tuple[Study, ...]:
    """Return a study by name for each of ``settings``, after a search over two seeds with coarser ``grids``."""
    coarse = tuple(
        replace(stage, grid={key: (grids or {}).get(key, choices) for key, choices in stage.grid.items()})
        for stage in stages
    )
    more |= {"search_seeds": 2, "held_out": THIRD, "stages": coarse}
    named = settings or {"digits": NOISY_DIGITS}
    return tuple(Study(name, each, methods, **more) for name, each in named.items())
