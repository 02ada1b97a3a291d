"""WSAM's main comparison: test error on CIFAR-10 and CIFAR-100 after its two-stage grid search."""

from dataclasses import replace

from steppe.lab.recipes import protocol as p
from steppe.lab.recipes.frame import Recipe, Scale, Study

METHODS = (p.VANILLA, p.SAM, p.ESAM, p.GSAM, p.WSAM)
STAGES = (p.BASE_STAGE, p.RHO_STAGE, p.ESAM_STAGE, p.GSAM_STAGE, p.WSAM_STAGE)


def studies(scale: Scale) -> tuple[Study, ...]:
    """Return the comparison on each data set and net."""
    if scale == "laptop":
        coarse = p.on_digits(STAGES, esam_beta=(0.5,), esam_gamma=(0.4, 0.6), alpha=(0.02, 0.1, 0.3), gamma=p.FEW)
        return (Study("digits", p.CLEAN_DIGITS, METHODS, stages=coarse, search_seeds=2, held_out=p.THIRD),)
    if scale == "gpu-hour":
        return (Study("cifar10-resnet18", p.HOUR, METHODS, seeds=3, values=p.EXAMPLE),)
    nets = [(name, net) for name in ("cifar10", "cifar100") for net in ("resnet18", "wrn28-10")]
    settings = {
        f"{name}-{net}": p.wide(replace(p.CIFAR10, data=name)) if net == "wrn28-10" else replace(p.CIFAR10, data=name)
        for name, net in nets
    }
    return tuple(Study(name, each, METHODS, seeds=5, stages=STAGES) for name, each in settings.items())


RECIPE = Recipe(
    "wsam_classification",
    "Does WSAM have lower test error than SAM, ESAM and GSAM after the same search?",
    "WSAM (arXiv 2305.15817), Tables 2 and 3",
    (
        ("nets and batches", "ResNet-18 with 128, WRN-28-10 with 256; CIFAR-10 and CIFAR-100, basic augmentation"),
        ("training", "SGD momentum 0.9, cosine, 200 epochs, vanilla 400; 5 seeds"),
        ("search", "lr and weight decay on the base and kept; rho on SAM and shared; then each method's own"),
        ("validation split of the search", f"{p.NOT_KNOWN}; here a tenth of the training examples"),
        ("tuned values (Table 3)", f"{p.NOT_KNOWN}; an example in the code has rho 0.2, gamma 0.9"),
        ("numbers (Table 2)", f"{p.NOT_KNOWN}; said of them: WSAM is best"),
        ("smaller scales", p.LAPTOP),
    ),
    studies,
)
