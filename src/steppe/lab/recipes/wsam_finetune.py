"""WSAM's further training of a finished DeiT-base on ImageNet."""

from dataclasses import replace

from steppe.lab.recipes import protocol as p
from steppe.lab.recipes.frame import Recipe, Scale, Study
from steppe.lab.sweep.space import Stage

METHODS = ("SGD", p.SAM, p.GSAM, p.WSAM)
RHO = (0.05, 0.1, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 4.5, 5.0, 5.5, 6.0)
GAMMA = (0.8, 0.82, 0.84, 0.86, 0.88, 0.9, 0.92, 0.94, 0.96, 0.98)
STAGES = (Stage("radius", p.SAM, {"rho": RHO}), p.GSAM_STAGE, Stage("WSAM", p.WSAM, {"gamma": GAMMA}))
DEIT = replace(p.IMAGENET, model="hf:deit-b16", epochs=3, batch_size=256, lr=1e-5, weight_decay=1e-4)
HOUR = replace(p.HOUR, epochs=3, lr=1e-3, start="SGD(epochs=15)", start_lr=0.1)
DIGITS = replace(p.NOISY_DIGITS, noise=0.2, epochs=10, lr=0.005, start="SGD(epochs=80)")


def studies(scale: Scale) -> tuple[Study, ...]:
    """Return the further training from one finished run a seed."""
    if scale == "laptop":
        coarse = p.on_digits(STAGES, rho=(0.05, 0.1, 0.5, 1.0, 2.0, 4.0), gamma=(0.8, 0.88, 0.92, 0.96))
        return (Study("digits", DIGITS, METHODS, stages=coarse, search_seeds=2, held_out=p.THIRD),)
    if scale == "gpu-hour":
        return (Study("cifar10-resnet18", HOUR, METHODS, seeds=3, values={**p.EXAMPLE, "rho": 0.5}),)
    return (Study("imagenet-deit", DEIT, METHODS, seeds=5, stages=STAGES),)


RECIPE = Recipe(
    "wsam_finetune",
    "Does a finished net gain from a few further epochs with a sharpness-aware method?",
    "WSAM (arXiv 2305.15817), Table 4",
    (
        ("net", "DeiT-base, resumed from its checkpoint (error 18.2 %), 3 epochs of ImageNet"),
        ("bring", "a folder deit-b16 that transformers has saved"),
        ("training", "SGD momentum 0.9, batch 256, lr 1e-5, weight decay 1e-4; 5 runs"),
        ("search", "rho from 0.05, 0.1, 0.5, 1.0, ..., 6.0, best 5.5, shared; GSAM's alpha; gamma 0.80 to 0.98"),
        ("numbers", f"{p.NOT_KNOWN} but for the 18.2 % before; said: all better than the base, not clearly apart"),
        ("smaller scales", "the start is SGD on the same data; " + p.LAPTOP),
    ),
    studies,
)
