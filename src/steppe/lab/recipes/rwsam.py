"""The tables of RW-SAM (arXiv 2509.18001), as reported in published reading notes."""

from dataclasses import replace
from typing import Any

from steppe.lab.recipes import shared as s
from steppe.lab.recipes.recipe import Recipe, Study
from steppe.lab.settings import Settings
from steppe.lab.sweep.space import Stage

_SOURCE = "RW-SAM (arXiv 2509.18001), as reported in published reading notes"
_THREE = ("SGD", s.SAM, s.RWSAM)  # the columns of its tables
_METHODS = ("SGD", s.VANILLA, s.SAM, s.RWSAM)
_EIGEN = replace(s.CIFAR10, batch_size=256)  # the same group's Eigen-SAM code: lr 0.1, 5e-4, 200 epochs, rho 0.1


def _stages(*lambdas: float, radius: Stage = s.RHO_STAGE) -> tuple[Stage, ...]:
    return (radius, Stage("RWSAM", s.RWSAM, {"lam": lambdas}))


def _errors(*accuracies: float) -> dict[str, float]:
    """Return the test errors of SGD, SAM and RW-SAM in per cent."""
    return {text: round(100 - right, 2) for text, right in zip(_THREE, accuracies, strict=True)}


_TABLE = {
    ("cifar10", "resnet18"): _errors(95.62, 95.99, 96.24),
    ("cifar10", "resnet50"): _errors(95.64, 96.06, 96.34),
    ("cifar10", "wrn28-10"): _errors(96.47, 96.91, 97.11),
    ("cifar100", "resnet18"): _errors(78.91, 78.90, 79.31),
    ("cifar100", "resnet50"): _errors(79.55, 80.31, 80.83),
    ("cifar100", "wrn28-10"): _errors(81.55, 83.25, 83.52),
    ("imagenet", "resnet50"): _errors(76.67, 77.16, 77.37),
}
_SEARCH = _stages(0.1, 0.25, 0.5, 1.0, 2.0, 4.0)
_SHOWN = _TABLE["cifar10", "resnet18"]

CLASSIFICATION = Recipe(
    "rwsam_classification",
    "Does weighting examples by their gradient norms in the perturbation lower the error?",
    _SOURCE,
    (
        ("nets and data", "ResNet-18, ResNet-50, WRN-28-10 on CIFAR-10 and CIFAR-100; ResNet-50 on ImageNet"),
        ("ImageNet", s.START),
        ("rho, lr, weight decay, batch, epochs", f"{s.UNREAD}; here those of the same group's Eigen-SAM code"),
        ("lambda and the probe's length", f"{s.UNREAD}; here lambda is searched, norms exact where the net factors"),
        ("numbers", f"as published, one decimal more than our seeds resolve; n and spread {s.UNREAD}"),
        ("laptop", s.LAPTOP),
    ),
    paper=tuple(
        Study(
            f"{data}-{model}",
            s.IMAGENET if data == "imagenet" else replace(_EIGEN, data=data, model=model),
            _METHODS,
            stages=_SEARCH,
            published=errors,
        )
        for (data, model), errors in _TABLE.items()
    ),
    laptop=(
        *s.digits(_METHODS, _SEARCH, {"digits": s.CLEAN_DIGITS}, published=_SHOWN),
        Study("digits-same-rho", s.CLEAN_DIGITS, _METHODS, values={"rho": 0.1, "lam": 0.5}, published=_SHOWN),
    ),
    setting="the paper's own data and net (laptop: CIFAR-10, ResNet-18)",
)

_TUNED = {"cifar10": _errors(98.24, 98.40, 98.58), "cifar100": _errors(88.71, 89.63, 89.89)}
_TUNING = _stages(0.25, 0.5, 1.0, 2.0)
_VIT = replace(
    s.CIFAR10, model="large_images:vit", epochs=10, lr=0.01, weight_decay=0.0, augment="crop-flip", image_size=224
)

FINETUNE = Recipe(
    "rwsam_finetune",
    "Does RW-SAM help where a pre-trained net is fine-tuned?",
    _SOURCE,
    (
        ("net and data", "ViT-B/16, pre-trained, on CIFAR-10 and CIFAR-100"),
        ("bring", "CIFAR and a folder vit-b16 that transformers has saved; " + s.START),
        ("base optimizer, lr, epochs, batch, rho, lambda", f"{s.UNREAD}; here SGD, lr 0.01, 10 epochs: our choice"),
        ("GLUE", f"reported there too; its numbers are {s.UNREAD}, and it is left out"),
        ("laptop", "the start is SGD on the same data; " + s.LAPTOP),
    ),
    paper=tuple(
        Study(f"{data}-vit", replace(_VIT, data=f"large_images:{data}"), _THREE, stages=_TUNING, published=errors)
        for data, errors in _TUNED.items()
    ),
    laptop=s.digits(_THREE, _TUNING, {"digits": s.FURTHER_DIGITS}, published=_TUNED["cifar10"]),
    setting="ViT-B/16 on the paper's data (laptop: CIFAR-10)",
)

_NOISE = {
    0.2: _errors(87.54, 90.01, 90.34),
    0.4: _errors(83.66, 86.40, 86.87),
    0.6: _errors(76.64, 78.79, 81.52),
    0.8: _errors(46.53, 37.69, 53.17),
}
_COARSE = _stages(0.25, 1.0, 4.0, radius=Stage("radius", s.SAM, {"rho": s.FEW_RHO}))


def _noisy(settings: Settings, stages: tuple[Stage, ...], *levels: float, **more: Any) -> tuple[Study, ...]:
    more |= {"stages": stages, "search_seeds": 2}
    return tuple(
        Study(f"noise-{level}", replace(settings, noise=level), _METHODS, published=_NOISE[level], **more)
        for level in levels
    )


LABEL_NOISE = Recipe(
    "rwsam_label_noise",
    "Does RW-SAM resist wrong labels better than SAM, most of all at 80 %?",
    _SOURCE.replace(",", ", Table 4,"),
    (
        ("noise", f"20, 40, 60 and 80 %; whether it is symmetric: {s.UNREAD}"),
        ("data and net", f"{s.UNREAD}; here CIFAR-10 and ResNet-18"),
        ("training, rho, lambda", f"{s.UNREAD}; here of the same group's Eigen-SAM code, rho and lambda searched"),
        ("numbers", f"as published; n and spread {s.UNREAD}"),
        ("laptop", "40 and 80 %; " + s.LAPTOP),
    ),
    paper=_noisy(_EIGEN, _TUNING, *_NOISE),
    laptop=_noisy(s.NOISY_DIGITS, _COARSE, 0.4, 0.8, held_out=s.THIRD),
    setting="the paper's own data, which the source does not name",
)

RECIPES = (CLASSIFICATION, FINETUNE, LABEL_NOISE)
