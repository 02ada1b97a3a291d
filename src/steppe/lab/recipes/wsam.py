"""The tables and figures of WSAM (Yue et al. 2023, arXiv 2305.15817)."""

from dataclasses import replace

from steppe.lab.recipes import shared as s
from steppe.lab.recipes.recipe import Recipe, Study
from steppe.lab.settings import Settings
from steppe.lab.sweep.space import Stage

_FIVE = (s.VANILLA, s.SAM, s.ESAM, s.GSAM, s.WSAM)
_FIVE_STAGES = (s.BASE_STAGE, s.RHO_STAGE, s.ESAM_STAGE, s.GSAM_STAGE, s.WSAM_STAGE)
_FIVE_GRIDS = {"esam_beta": (0.5,), "esam_gamma": (0.4, 0.6), "alpha": (0.02, 0.1, 0.3), "gamma": s.FEW}

CLASSIFICATION = Recipe(
    "wsam_classification",
    "Does WSAM have lower test error than SAM, ESAM and GSAM after the same search?",
    "WSAM (arXiv 2305.15817), Tables 2 and 3",
    (
        ("nets and batches", "ResNet-18 with 128, WRN-28-10 with 256; CIFAR-10 and CIFAR-100, basic augmentation"),
        ("training", "SGD momentum 0.9, cosine, 200 epochs, vanilla 400; 5 seeds"),
        ("search", "lr and weight decay on the base and kept; rho on SAM and shared; then each method's own"),
        ("validation split of the search", f"{s.UNREAD}; here a tenth of the training examples"),
        ("tuned values (Table 3)", f"{s.UNREAD}; an example in the code has rho 0.2, gamma 0.9"),
        ("numbers (Table 2)", f"{s.UNREAD}; said of them: WSAM is best"),
        ("laptop", s.LAPTOP),
    ),
    paper=s.four(_FIVE, _FIVE_STAGES),
    laptop=s.digits(_FIVE, _FIVE_STAGES, {"digits": s.CLEAN_DIGITS}, _FIVE_GRIDS),
)

_DEIT = replace(s.IMAGENET, model="large_images:deit", epochs=3, lr=1e-5, weight_decay=1e-4)
_FOUR = ("SGD", s.SAM, s.GSAM, s.WSAM)
_FOUR_STAGES = (
    Stage("radius", s.SAM, {"rho": (0.05, *s.LARGE_RHO)}),
    s.GSAM_STAGE,
    Stage("WSAM", s.WSAM, {"gamma": (*s.HIGH_GAMMA, 0.96, 0.98)}),
)
_FOUR_GRIDS = {"rho": (0.05, 0.1, 0.5, 1.0, 2.0, 4.0), "gamma": (0.8, 0.88, 0.92, 0.96)}

FINETUNE = Recipe(
    "wsam_finetune",
    "Does a finished net gain from a few further epochs with a sharpness-aware method?",
    "WSAM (arXiv 2305.15817), Table 4",
    (
        ("net", "DeiT-base, resumed from its checkpoint (error 18.2 %), 3 epochs of ImageNet"),
        ("bring", "ImageNet and a folder deit-b16 that transformers has saved; " + s.START),
        ("training", "SGD momentum 0.9, batch 256, lr 1e-5, weight decay 1e-4; 5 runs"),
        ("search", "rho from 0.05, 0.1, 0.5, 1.0, ..., 6.0, best 5.5, shared; GSAM's alpha; gamma 0.80 to 0.98"),
        ("numbers", f"{s.UNREAD} but for the 18.2 % before; said: all better than the base, not clearly apart"),
        ("laptop", "the start is SGD on the same data; " + s.LAPTOP),
    ),
    paper=(Study("imagenet-deit", _DEIT, _FOUR, stages=_FOUR_STAGES),),
    laptop=s.digits(_FOUR, _FOUR_STAGES, {"digits": s.FURTHER_DIGITS}, _FOUR_GRIDS),
)

_LEVELS = {level: f"noise-{level}" for level in (0.2, 0.4, 0.6, 0.8)}
_NOISY = replace(s.CIFAR10, lr=0.05, weight_decay=1e-3)
_MIDDLE = {"esam_beta": 0.5, "esam_gamma": 0.5, "alpha": 0.1}  # of their grids

LABEL_NOISE = Recipe(
    "label_noise",
    "Which method resists wrong labels best?",
    "WSAM (arXiv 2305.15817), Tables 5 and 6",
    (
        ("data and net", "CIFAR-10 with 20, 40, 60 and 80 % symmetric noise, ResNet-18"),
        ("training", "SGD momentum 0.9, cosine, 200 epochs, batch 128, lr 0.05, weight decay 1e-3"),
        ("seeds", f"{s.UNREAD}; here 5"),
        ("epochs of vanilla", f"{s.UNREAD} for these tables; here twice the others', as in Table 2"),
        ("search", "rho for each level of noise; the others' grids as in Table 2"),
        ("numbers", f"{s.UNREAD}; said of them: WSAM is usually better than SAM, ESAM and GSAM"),
        ("validation labels", "noisy, as the training labels: a search has no clean ones"),
        ("laptop", "rho and WSAM's gamma searched, coarsely; " + s.LAPTOP),
    ),
    paper=tuple(
        Study(name, replace(_NOISY, noise=level), _FIVE, stages=_FIVE_STAGES[1:]) for level, name in _LEVELS.items()
    ),
    laptop=s.digits(
        _FIVE,
        (s.RHO_STAGE, s.WSAM_STAGE),
        {name: replace(s.NOISY_DIGITS, noise=level) for level, name in _LEVELS.items()},
        {"rho": s.FEW_RHO, "gamma": s.FEW},
        values=_MIDDLE,
    ),
)

_ASAM, _FISHER = "ASAM(rho={rho_asam})", "FisherSAM(rho={rho_fisher})"
_ADAPTIVE_WSAM = "AdaptiveWSAM(rho={rho_asam}, gamma={gamma_asam})"
_FISHER_WSAM = "FisherWSAM(rho={rho_fisher}, gamma={gamma_fisher})"
_SIX = (s.SAM, s.WSAM, _ASAM, _ADAPTIVE_WSAM, _FISHER, _FISHER_WSAM)
_SIX_STAGES = (
    s.RHO_STAGE,
    s.WSAM_STAGE,
    Stage("ASAM", _ASAM, {"rho_asam": s.LARGE_RHO}),
    Stage("AdaptiveWSAM", _ADAPTIVE_WSAM, {"gamma_asam": s.HIGH_GAMMA}),
    Stage("Fisher", _FISHER, {"rho_fisher": s.LARGE_RHO}),
    Stage("FisherWSAM", _FISHER_WSAM, {"gamma_fisher": s.HIGH_GAMMA}),
)
_SIX_GRIDS = {"rho": s.FEW_RHO, "rho_asam": (0.5, 1.0, 2.0, 4.0), "rho_fisher": (0.1, 0.5, 1.0, 2.0)}
_SIX_GRIDS |= dict.fromkeys(("gamma", "gamma_asam", "gamma_fisher"), s.FEW)

GEOMETRY = Recipe(
    "geometry",
    "Does WSAM gain from an adaptive neighbourhood?",
    "WSAM (arXiv 2305.15817), Table 7",
    (
        ("data and net", "CIFAR-10, WRN-28-10, as in Table 2"),
        ("search", "rho from 0.1, 0.5, 1.0, ..., 6.0: best 5.0 for ASAM and Fisher; gamma 0.80 to 0.94: best 0.88"),
        ("lr, weight decay", f"{s.UNREAD}; here lr 0.1 and 5e-4"),
        ("numbers", f"{s.UNREAD}; said of them: plain WSAM is best, and its authors advise it"),
        ("laptop", "coarser grids on the digits with 40 % label noise; " + s.LAPTOP),
    ),
    paper=(Study("cifar10-wrn28-10", s.WIDE, _SIX, values=s.EXAMPLE, stages=_SIX_STAGES),),
    laptop=s.digits(_SIX, _SIX_STAGES, grids=_SIX_GRIDS),
)

_COUPLING = (s.VANILLA, s.SAM, s.COUPLED, s.WSAM)
_COUPLING_STAGES = (s.BASE_STAGE, s.RHO_STAGE, s.COUPLED_STAGE, s.WSAM_STAGE)
_COUPLING_GRIDS = dict.fromkeys(("gamma", "coupled_gamma"), (0.5, 0.6, 0.7, 0.8, 0.88, 0.92))

DECOUPLING = Recipe(
    "decoupling",
    "Is the sharpness term better beside the base optimizer (WSAM) than through it (Coupled-WSAM)?",
    "WSAM (arXiv 2305.15817), Table 8",
    (
        ("protocol", "as Table 2; gamma searched for each of the two"),
        ("numbers", f"{s.UNREAD}; said of them: Coupled above SAM in most cases, WSAM above Coupled in most"),
        ("a caution", "with momentum 0.9 the same gamma weighs ten times more through the base than beside it"),
        ("laptop", "coarser grids on the digits with 40 % label noise; " + s.LAPTOP),
    ),
    paper=s.four(_COUPLING, _COUPLING_STAGES),
    laptop=s.digits(_COUPLING, _COUPLING_STAGES[1:], grids=_COUPLING_GRIDS, seeds=10),
)

_ENDS = ("SGD", s.SAM, s.WSAM)

MINIMA = Recipe(
    "minima",
    "Is WSAM's minimum as flat as SAM's, at a lower loss?",
    "WSAM (arXiv 2305.15817), Table 9",
    (
        ("measured", "training loss and top Hessian eigenvalue, by power iteration"),
        ("data, net, iterations, batch-norm mode", s.UNREAD),
        ("numbers", f"{s.UNREAD}; said: vanilla low loss and sharp, SAM higher and flat, WSAM near SAM at less loss"),
        ("laptop", "the protocol of `steppe compare`: 1,000 digits with 40 % label noise, MLP 64-256-256-10"),
    ),
    paper=(Study("cifar10-resnet18", s.CIFAR10, _ENDS, values=s.EXAMPLE),),
    laptop=(Study("digits", Settings(), _ENDS, values={"rho": 0.5, "gamma": 0.9}),),
    measured=True,
)


def _gammas(gammas: tuple[float, ...], rho: float | str) -> list[str]:
    return [f"WSAM(rho={rho}, gamma={gamma})" for gamma in gammas]


_RADII = (0.1, 0.2, 0.5)
_WSAMS = [method for rho in _RADII for method in _gammas((0.5, 0.7, 0.8, 0.86, 0.9, 0.94), rho)]

GAMMA_SENSITIVITY = Recipe(
    "gamma_sensitivity",
    "How much does WSAM's error depend on gamma?",
    "WSAM (arXiv 2305.15817), Figure 3",
    (
        ("protocol", "as Table 2, gamma over a wide range"),
        ("numbers", f"{s.UNREAD}; said of them: the best is almost always in [0.8, 0.95]"),
        ("laptop", "gamma at three radii, the digits with 40 % label noise; " + s.LAPTOP),
    ),
    paper=s.four((s.VANILLA, s.SAM, *_gammas(s.GAMMA, "{rho}")), (s.BASE_STAGE, s.RHO_STAGE)),
    laptop=(Study("digits", s.NOISY_DIGITS, ("SGD", *(f"SAM(rho={rho})" for rho in _RADII), *_WSAMS)),),
)

RECIPES = (CLASSIFICATION, FINETUNE, LABEL_NOISE, GEOMETRY, DECOUPLING, MINIMA, GAMMA_SENSITIVITY)
