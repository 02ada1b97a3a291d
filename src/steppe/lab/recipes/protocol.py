"""Settings, grids and stages that several recipes share; sources in the recipes."""

from dataclasses import replace

from steppe.lab.settings import Settings
from steppe.lab.sweep.space import Stage

NOT_KNOWN = "not known"

# WSAM's grids (arXiv 2305.15817, section on image classification)
LR = (0.05, 0.1)
WEIGHT_DECAY = (1e-4, 5e-4, 1e-3)
RHO = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
GAMMA = (0.5, 0.6, 0.7, 0.8, 0.82, 0.84, 0.86, 0.88, 0.9, 0.92, 0.94, 0.96)
FEW = (0.5, 0.7, 0.8, 0.88)  # of gamma, for two cores
ALPHA = (0.01, 0.02, 0.03, 0.1, 0.2, 0.3)  # GSAM's
SHARE = (0.4, 0.5, 0.6)  # ESAM's beta and gamma

VANILLA = "SGD(epochs=2x)"
SAM = "SAM(rho={rho})"
WSAM = "WSAM(rho={rho}, gamma={gamma})"
COUPLED = "CoupledWSAM(rho={rho}, gamma={coupled_gamma})"
GSAM = "GSAM(rho={rho}, alpha={alpha})"
ESAM = "ESAM(rho={rho}, beta={esam_beta}, gamma={esam_gamma})"

BASE_STAGE = Stage("base", VANILLA, {"lr": LR, "weight_decay": WEIGHT_DECAY})
RHO_STAGE = Stage("radius", SAM, {"rho": RHO})
WSAM_STAGE = Stage("WSAM", WSAM, {"gamma": GAMMA})
COUPLED_STAGE = Stage("CoupledWSAM", COUPLED, {"coupled_gamma": GAMMA})
GSAM_STAGE = Stage("GSAM", GSAM, {"alpha": ALPHA})
ESAM_STAGE = Stage("ESAM", ESAM, {"esam_beta": SHARE, "esam_gamma": SHARE})

# the example of WSAM's code: ResNet-18, CIFAR-10; alpha, beta and the other gammas are the middle of their grids
EXAMPLE = {
    "lr": 0.1, "weight_decay": 5e-4, "rho": 0.2, "gamma": 0.9, "coupled_gamma": 0.5, "alpha": 0.1,
    "esam_beta": 0.5, "esam_gamma": 0.5,
}  # fmt: skip

CIFAR10 = Settings(
    "cifar10", train_size=50_000, noise=0.0, model="resnet18", epochs=200, batch_size=128, lr=0.1, weight_decay=5e-4
)
CIFAR100 = replace(CIFAR10, data="cifar100")
HOUR = replace(CIFAR10, epochs=15)  # five methods, three seeds, at 7 s an epoch of one pass: an estimate, not measured
IMAGENET = replace(CIFAR10, data="imagenet", train_size=1_281_167, model="resnet50", epochs=90, batch_size=256)

# Embedded data for two cores: one test set for all seeds, which searches never see. A tenth of 600 examples would be
# too few to tell points apart, so searches hold out a third.
THIRD = round(1 / 3, 4)
NOISY_DIGITS = Settings(train_size=600, model="mlp-128-128", epochs=80, test_seed=0)
CLEAN_DIGITS = Settings(
    train_size=600, noise=0.0, model="mlp-128-128", epochs=80, batch_size=64, weight_decay=1e-3, test_seed=0
)
LAPTOP = "laptop: scikit-learn's digits, MLP 64-128-128-10; gpu-hour: fewer epochs and seeds, no search"


def wide(settings: Settings) -> Settings:
    """Return the settings for WRN-28-10, which WSAM's authors train with batches of 256."""
    return replace(settings, model="wrn28-10", batch_size=256)


def on_digits(stages: tuple[Stage, ...], **grids: tuple[float, ...]) -> tuple[Stage, ...]:
    """Return stages with coarser grids."""
    return tuple(
        replace(stage, grid={key: grids.get(key, choices) for key, choices in stage.grid.items()}) for stage in stages
    )
