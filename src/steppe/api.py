"""The public names of steppe; ``import steppe`` finds them here on first use."""

from steppe import schedule
from steppe.batch import Batch, Batches
from steppe.engine.oracle import Oracle
from steppe.engine.update import Update
from steppe.engine.vector import Vector
from steppe.joint import Joint
from steppe.mean_batch import MeanBatch
from steppe.methods import (
    AESAM,
    ASAM,
    ESAM,
    FSAM,
    GAM,
    GCSAM,
    GSAM,
    LESAM,
    METHODS,
    NSAM,
    RWSAM,
    SAM,
    SANER,
    SSAM,
    USAM,
    WSAM,
    XSAM,
    CoupledWSAM,
    EigenSAM,
    FisherSAM,
    FunctionalSAM,
    LightSAM,
    LookbehindSAM,
    LookSAM,
    MomentumSAM,
    PreconditionedSAM,
    ReweightedSharpness,
    UnifiedSAM,
    VaSSO,
    ZSharp,
)
from steppe.optimizer import SharpnessAware
from steppe.pieces.combine import (
    Coupled,
    Damped,
    Perturbed,
    RememberOrthogonal,
    Rescaled,
    ReuseOrthogonal,
    SearchedSlerp,
    Slerp,
    SurrogateGap,
    Weighted,
)
from steppe.pieces.eigen import Eigen, EigenCorrected
from steppe.pieces.geometry import (
    Accumulated,
    Adaptive,
    Euclidean,
    Fisher,
    LossBudget,
    Preconditioned,
    Scaled,
    Unified,
    Unnormalised,
)
from steppe.pieces.protocol import Declaration
from steppe.pieces.rules import BothWeighted, Functional, GradientNorm, Lookbehind
from steppe.pieces.sample import (
    Centralised,
    Filtered,
    Friendly,
    Masked,
    Mean,
    Momentum,
    OnFull,
    Reweighted,
    Smoothed,
    Stale,
    Subset,
)
from steppe.pieces.select import All, Sharpest
from steppe.pieces.weights import ByClass, EffectiveSize, Exact, FiniteDifference, Softmax
from steppe.pieces.which import Everything, Matrices, Named
from steppe.rule import Every, Micro, Plain, Rule, WhereSteep
from steppe.telemetry import Telemetry

__all__ = [
    "AESAM", "ASAM", "ESAM", "FSAM", "GAM", "GCSAM", "GSAM", "LESAM", "METHODS", "NSAM", "RWSAM", "SAM", "SANER",
    "SSAM", "USAM", "WSAM", "XSAM", "Accumulated", "Adaptive", "All", "Batch", "Batches", "BothWeighted", "ByClass",
    "Centralised", "Coupled", "CoupledWSAM", "Damped", "Declaration", "EffectiveSize", "Eigen", "EigenCorrected",
    "EigenSAM", "Euclidean", "Every", "Everything", "Exact", "Filtered", "FiniteDifference", "Fisher", "FisherSAM",
    "Friendly", "Functional", "FunctionalSAM", "GradientNorm", "Joint", "LightSAM", "LookSAM", "Lookbehind",
    "LookbehindSAM", "LossBudget", "Masked", "Matrices", "Mean", "MeanBatch", "Micro", "Momentum", "MomentumSAM",
    "Named", "OnFull", "Oracle", "Perturbed", "Plain", "Preconditioned", "PreconditionedSAM", "RememberOrthogonal",
    "Rescaled", "ReuseOrthogonal", "Reweighted", "ReweightedSharpness", "Rule", "Scaled", "SearchedSlerp", "Sharpest",
    "SharpnessAware", "Slerp", "Smoothed", "Softmax", "Stale", "Subset", "SurrogateGap", "Telemetry", "Unified",
    "UnifiedSAM", "Unnormalised", "Update", "VaSSO", "Vector", "Weighted", "WhereSteep", "ZSharp", "schedule",
]  # fmt: skip
