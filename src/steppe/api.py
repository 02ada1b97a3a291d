"""The public names of steppe; ``import steppe`` finds them here on first use."""

from steppe import schedule
from steppe.batch import Batch, Batches
from steppe.engine.oracle import Oracle
from steppe.engine.update import Update
from steppe.engine.vector import Vector
from steppe.joint import Joint
from steppe.mean_batch import MeanBatch
from steppe.methods import (
    ASAM,
    ESAM,
    FSAM,
    GSAM,
    METHODS,
    NSAM,
    RWSAM,
    SAM,
    USAM,
    WSAM,
    CoupledWSAM,
    FisherSAM,
    LookSAM,
    ReweightedSharpness,
    UnifiedSAM,
    VaSSO,
)
from steppe.optimizer import SharpnessAware
from steppe.pieces.combine import Coupled, Perturbed, RememberOrthogonal, ReuseOrthogonal, SurrogateGap, Weighted
from steppe.pieces.geometry import (
    Adaptive,
    Euclidean,
    Everything,
    Fisher,
    Matrices,
    Named,
    Scaled,
    Unified,
    Unnormalised,
)
from steppe.pieces.protocol import Declaration
from steppe.pieces.rules import BothWeighted
from steppe.pieces.sample import Friendly, Masked, Mean, OnFull, Reweighted, Smoothed, Subset
from steppe.pieces.select import All, Sharpest
from steppe.pieces.weights import EffectiveSize, Exact, FiniteDifference, Softmax
from steppe.rule import Every, Micro, Plain, Rule
from steppe.telemetry import Telemetry

__all__ = [
    "ASAM", "ESAM", "FSAM", "GSAM", "METHODS", "NSAM", "RWSAM", "SAM", "USAM", "WSAM", "Adaptive", "All", "Batch",
    "Batches", "BothWeighted", "Coupled", "CoupledWSAM", "Declaration", "EffectiveSize", "Euclidean", "Every",
    "Everything", "Exact", "FiniteDifference", "Fisher", "FisherSAM", "Friendly", "Joint", "LookSAM", "Masked",
    "Matrices", "Mean", "MeanBatch", "Micro", "Named", "OnFull", "Oracle", "Perturbed", "Plain", "RememberOrthogonal",
    "ReuseOrthogonal", "Reweighted", "ReweightedSharpness", "Rule", "Scaled", "Sharpest", "SharpnessAware", "Smoothed",
    "Softmax", "Subset", "SurrogateGap", "Telemetry", "Unified", "UnifiedSAM", "Unnormalised", "Update", "VaSSO",
    "Vector", "Weighted", "schedule",
]  # fmt: skip
