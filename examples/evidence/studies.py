"""The studies behind docs/results.md: each is one fair comparison, ``steppe compare`` with these options.

    python examples/evidence/studies.py                       # the names
    python examples/evidence/studies.py --study digits-clean  # train it, or go on with it; runs/evidence/digits-clean

Further options of ``steppe compare`` may follow. ``--minutes 9`` stops with exit code 75 after so long and keeps
everything; the same command goes on. So a study for a GPU runs in slices:

    until python examples/evidence/studies.py --study cifar10-resnet18 --data-dir DATA --minutes 9
    do test $? = 75 || break; done
"""

import argparse
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
METHODS = (
    "SAM",
    "ASAM",
    "WSAM",
    "SAM(m={m})",
    "SAM(m={m}, sampled=1)",
    "SAM(m={m}, sampled=1, clip={clip})",
    "SAM(ascent={ascent})",
    "RWSAM",
    "ReweightedSharpness",
    "GSAM",
    "FSAM",
    "LookSAM",
    "LateSAM",
)
FEWER = (  # where a run is dear
    "SAM",
    "ASAM",
    "WSAM",
    "SAM(m={m})",
    "SAM(m={m}, sampled=1)",
    "SAM(ascent={ascent})",
    "ReweightedSharpness",
    "GSAM",
    "LateSAM",
)


@dataclass(frozen=True)
class Study:
    """A title, the data, and the options of ``steppe compare`` that differ from its own."""

    title: str
    data: str
    given: dict[str, Any]
    trials: int = 32
    search_seeds: int = 2
    seeds: int = 10
    methods: tuple[str, ...] = METHODS
    spaces: dict[str, str] = field(default_factory=dict)

    def words(self) -> list[str]:
        """Return the command, after ``steppe``."""
        words = ["compare", "--data", self.data]
        for key, value in self.given.items():
            words += [f"--{key.replace('_', '-')}", str(value)]
        words += [word for method in self.methods for word in ("--method", method)]
        words += [word for key, text in self.spaces.items() for word in ("--space", f"{key}={text}")]
        counts = {"trials": self.trials, "search-seeds": self.search_seeds, "seeds": self.seeds}
        return words + [word for key, count in counts.items() for word in (f"--{key}", f"{count}")]


_DIGITS = {"model": "mlp-128-128", "epochs": 60, "train_size": 1000}

_FASHION = {"epochs": 20, "lr": 0.05, "batch_size": 64}
_SMALL: dict[str, Any] = {"trials": 20, "seeds": 5}
_DEAR: dict[str, Any] = {"methods": FEWER, "spaces": {"m": "8,16,32"}, "trials": 12, "seeds": 5}

STUDIES = {
    "digits-clean": Study("Digits, clean", "digits", _DIGITS | {"noise": 0.0}, search_seeds=3),
    "digits-noise": Study("Digits, 40 % noise", "digits", _DIGITS | {"noise": 0.4}, search_seeds=3),
    **{
        f"digits-noise-{draw + 1}": Study(
            f"The same, search {draw + 1}",
            "digits",
            _DIGITS | {"noise": 0.4, "search_draw": draw},
            search_seeds=3,
            methods=("SAM", "SAM(m={m})", "SAM(m={m}, sampled=1)", "SAM(ascent={ascent})"),
        )
        for draw in (1, 2)
    },
    "letters": Study(
        "Letters of the fortunes, small GPT, AdamW",
        "tasks:letters",
        {"epochs": 8, "lr": 0.004, "batch_size": 32, "optimizer": "adamw", "weight_decay": 0.01},
        methods=("SAM", "ASAM", "SAM(m={m}, sampled=1)", "SAM(ascent={ascent})", "LateSAM"),
        trials=12,
        seeds=5,
        spaces={"m": "2,4,8", "ascent": "4,8,16"},
    ),
    "mnist1d": Study("MNIST-1D, clean", "tasks:mnist1d", {"epochs": 40, "lr": 0.1}, **_SMALL, spaces={"m": "8,16,32"}),
    "diabetes": Study(
        "Diabetes, regression",
        "tasks:diabetes",
        {"epochs": 30, "lr": 0.02, "batch_size": 32},
        spaces={"m": "4,8,16", "ascent": "4,8,16"},
        trials=24,
    ),
    "texts": Study(
        "Fortunes by file, text embeddings", "tasks:texts", {"epochs": 20, "lr": 0.1}, **_SMALL, spaces={"m": "8,16,32"}
    ),
    "fashion-clean": Study("Fashion-MNIST 14 x 14, clean, CNN", "tasks:fashion", _FASHION, **_DEAR),
    "fashion-noise": Study(
        "Fashion-MNIST 14 x 14, 40 % noise, CNN", "tasks:fashion", _FASHION | {"noise": 0.4}, **_DEAR
    ),
    "fashion-vit": Study(
        "Fashion-MNIST 14 x 14, clean, ViT, AdamW",
        "tasks:fashion_vit",
        {"epochs": 20, "lr": 0.002, "batch_size": 64, "optimizer": "adamw", "weight_decay": 0.01},
        **_DEAR,
    ),
}

_GPU: dict[str, Any] = {"epochs": 60, "device": "cuda", "precision": "bf16"}
_FEW = ("SAM", "SAM(m={m})", "SAM(m={m}, sampled=1)", "SAM(ascent={ascent})", "LateSAM")
_LONG: dict[str, Any] = {"methods": _FEW, "trials": 12, "search_seeds": 1, "seeds": 5}
_VIT = {"model": "vit-s4", "optimizer": "adamw", "lr": 0.001, "weight_decay": 0.05, "warmup": 1000}

for _data in ("cifar10", "cifar100"):
    STUDIES |= {
        f"{_data}-resnet18": Study(f"{_data}, ResNet-18", _data, _GPU | {"model": "resnet18"}, **_LONG),
        f"{_data}-wrn": Study(f"{_data}, WRN-28-10", _data, _GPU | {"model": "wrn28-10"}, **_LONG),
        f"{_data}-vit": Study(f"{_data}, ViT-S/4, AdamW", _data, _GPU | _VIT, **_LONG),
    }


def main() -> None:
    """Train a study, or list them."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--study", choices=STUDIES)
    options.add_argument("--out", type=Path, default=Path("runs") / "evidence", help="the folder of the studies")
    given, more = options.parse_known_args()
    if given.study is None:
        print("\n".join(f"{name:20}{study.title}" for name, study in STUDIES.items()))
        return
    from steppe.cli import main as steppe

    words = [*STUDIES[given.study].words(), "--workers", "1", "--out", str(given.out / given.study), *more]
    sys.path.append(str(HERE))  # a study's task is tasks:NAME
    sys.argv = ["steppe", *words]
    steppe()


if __name__ == "__main__":
    main()
