"""The studies behind docs/results.md: each is one fair comparison, ``steppe compare`` with these options.

    python examples/evidence/studies.py                       # the names
    python examples/evidence/studies.py --study digits-clean  # train it, or go on with it; runs/evidence/digits-clean

``--near`` trains, once a study is done, the second and third best trials of every search with final seeds too: what the
table would say had the search been a little luckier or less so. ``--rest`` trains the methods that a dear study leaves
out, into a folder NAME-rest; it searches the base again, with the same result, and tools/evidence.py joins the two.

Further options of ``steppe compare`` may follow. ``--minutes 9`` stops with exit code 75 after so long and keeps
everything; the same command goes on. So a study for a GPU runs in slices:

    until python examples/evidence/studies.py --study cifar10-resnet18 --data-dir DATA --minutes 9
    do test $? = 75 || break; done
"""

import argparse
import re
import sys
from dataclasses import dataclass, field, replace
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
FEWER = ("SAM", "ASAM", "SAM(m={m})", "SAM(m={m}, sampled=1)", "SAM(ascent={ascent})", "LateSAM")  # where a run is dear


@dataclass(frozen=True)
class Study:
    """A title, the data, and the options of ``steppe compare`` that differ from its own."""

    title: str
    data: str
    given: dict[str, Any]
    trials: int = 32
    near: int = 0  # of the trials
    search_seeds: int = 2
    seeds: int = 10
    methods: tuple[str, ...] = METHODS
    spaces: dict[str, str] = field(default_factory=dict)

    def rest(self) -> "Study":
        """Return the study of the methods that this one leaves out, without the spaces that none of these searches."""
        methods = tuple(method for method in METHODS if method not in self.methods)
        searched = {"lr", "rho", "epochs"}.union(*(re.findall(r"{(\w+)}", method) for method in methods))
        spaces = {key: text for key, text in self.spaces.items() if key in searched}
        return replace(self, methods=methods, spaces=spaces)

    def words(self) -> list[str]:
        """Return the command, after ``steppe``."""
        words = ["compare", "--data", self.data]
        for key, value in self.given.items():
            words += [f"--{key.replace('_', '-')}", str(value)]
        words += [word for method in self.methods for word in ("--method", method)]
        words += [word for key, text in self.spaces.items() for word in ("--space", f"{key}={text}")]
        counts = {"trials": self.trials, "near": self.near, "search-seeds": self.search_seeds, "seeds": self.seeds}
        return words + [word for key, count in counts.items() for word in (f"--{key}", f"{count}")]


_DIGITS = {"model": "mlp-128-128", "epochs": 60, "train_size": 1000}

_FASHION = {"epochs": 16, "lr": 0.05, "batch_size": 64}
_SMALL: dict[str, Any] = {"trials": 20, "seeds": 5}
_DEAR: dict[str, Any] = {"methods": FEWER, "spaces": {"m": "8,16,32"}, "trials": 12, "near": 5, "seeds": 5}
_WHOLE: dict[str, Any] = {"spaces": {"m": "8,16,32"}, "trials": 12, "near": 5, "search_seeds": 1, "seeds": 5}
_MORE: dict[str, Any] = _WHOLE | {"seeds": 10}
_RESNET = {"epochs": 10, "lr": 0.1}
_VIT = {"epochs": 12, "lr": 0.002, "batch_size": 64, "optimizer": "adamw", "weight_decay": 0.01}
_DEARER = _DEAR | {"trials": 10, "near": 4, "search_seeds": 1}

STUDIES = {
    "digits-clean": Study("Digits, clean", "digits", _DIGITS | {"noise": 0.0}, search_seeds=3),
    "digits-noise": Study("Digits, 40 % noise", "digits", _DIGITS | {"noise": 0.4}, search_seeds=3),
    "digits-noise-2": Study(
        "Digits, 40 % noise, another search",
        "digits",
        _DIGITS | {"noise": 0.4, "search_draw": 1},
        search_seeds=3,
        near=12,
        methods=("SAM", "SAM(m={m}, sampled=1)"),
    ),
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
    "mnist1d-long": Study(
        "MNIST-1D, clean, longer, a closer search",
        "tasks:mnist1d",
        {"epochs": 60, "lr": 0.2},
        methods=("SAM", "SAM(m={m}, sampled=1)", "SAM(ascent={ascent})"),
        trials=24,
        near=12,
        search_seeds=1,
        seeds=5,
        spaces={"lr": "0.05..0.8", "rho": "0.02..1.0"},
    ),
    "diabetes": Study(
        "Diabetes, regression",
        "tasks:diabetes",
        {"epochs": 20, "lr": 0.02, "batch_size": 32},
        spaces={"m": "4,8,16", "ascent": "4,8,16"},
        trials=16,
        seeds=6,
    ),
    "texts": Study(
        "Fortunes by file, text embeddings", "tasks:texts", {"epochs": 20, "lr": 0.1}, **_SMALL, spaces={"m": "8,16,32"}
    ),
    "texts-long": Study(
        "The same, three times as long",
        "tasks:texts",
        {"epochs": 60, "lr": 0.5},
        methods=("SAM", "SAM(m={m}, sampled=1)", "SAM(ascent={ascent})"),
        trials=16,
        near=8,
        seeds=5,
    ),
    "fashion-clean": Study("Fashion-MNIST 14 x 14, clean, CNN", "tasks:fashion", _FASHION, **_DEAR),
    "fashion-noise": Study(
        "Fashion-MNIST 14 x 14, 40 % noise, CNN", "tasks:fashion", _FASHION | {"noise": 0.4}, **_DEAR
    ),
    "fashion-clean-long": Study(
        "Fashion-MNIST 14 x 14, clean, CNN, three times as long", "tasks:fashion", _FASHION | {"epochs": 50}, **_MORE
    ),
    "fashion-noise-long": Study(
        "Fashion-MNIST 14 x 14, 40 % noise, CNN, three times as long",
        "tasks:fashion",
        _FASHION | {"epochs": 50, "noise": 0.4},
        **_MORE,
    ),
    "fashion-noise-20": Study(
        "Fashion-MNIST 14 x 14, 20 % noise, CNN", "tasks:fashion", _FASHION | {"epochs": 50, "noise": 0.2}, **_MORE
    ),
    "resnet-noise": Study(
        "Fashion-MNIST 14 x 14, 2,000 examples, 40 % noise, ResNet, batch norm",
        "tasks:fashion_resnet",
        _RESNET | {"noise": 0.4},
        **_DEARER,
    ),
    "resnet-clean": Study(
        "Fashion-MNIST 14 x 14, 2,000 examples, clean, ResNet, batch norm", "tasks:fashion_resnet", _RESNET, **_DEARER
    ),
    "vit": Study(
        "Fashion-MNIST 14 x 14, 2,000 examples, clean, ViT, AdamW",
        "tasks:fashion_vit",
        _VIT,
        **_DEARER,
    ),
    "vit-long": Study(
        "Fashion-MNIST 14 x 14, 2,000 examples, clean, ViT, AdamW, three times as long",
        "tasks:fashion_vit",
        _VIT | {"epochs": 36},
        **_WHOLE,
    ),
    "resnet-noise-long": Study(
        "Fashion-MNIST 14 x 14, 2,000 examples, 40 % noise, ResNet, batch norm, three times as long",
        "tasks:fashion_resnet",
        _RESNET | {"epochs": 30, "noise": 0.4},
        **_WHOLE,
    ),
}
for _name, _noise, _epochs, _cost in (
    ("clean", 0.0, 40, _MORE),
    ("noise-20", 0.2, 16, _DEARER),
    ("noise-20-long", 0.2, 40, _WHOLE),
    ("noise", 0.4, 40, _MORE),
):
    STUDIES[f"fashion28-{_name}"] = Study(
        f"Fashion-MNIST 28 x 28, 2,000 examples, {f'{_noise:.0%} noise' if _noise else 'clean'}, CNN"
        + (", longer" if _name.endswith("long") else ""),
        "tasks:fashion_28",
        {"epochs": _epochs, "lr": 0.1, "noise": _noise},
        **_cost,
    )

_FEW = ("SAM", "SAM(m={m})", "SAM(m={m}, sampled=1)", "SAM(ascent={ascent})", "LateSAM")
for _name, _trials, _near, _search_seeds in (
    ("digits-noise", 24, 0, 2),
    ("mnist1d-long", 20, 10, 1),
    ("texts-long", 16, 8, 1),
    ("fashion-noise-long", 12, 6, 1),
    ("fashion-clean-long", 12, 6, 1),
    ("resnet-noise-long", 12, 6, 1),
    ("vit-long", 12, 6, 1),
    ("letters", 12, 6, 1),
):
    _study = STUDIES[_name]
    STUDIES[f"{_name.removesuffix('-long')}-seconds"] = replace(
        _study,
        title=f"{_study.title}, at equal time",
        given=_study.given | {"equal": "seconds"},
        trials=_trials,
        near=_near,
        search_seeds=_search_seeds,
        seeds=10,
        methods=_FEW,
    )

STUDIES["fashion-noise-seconds-2"] = replace(
    STUDIES["fashion-noise-seconds"],
    title="Fashion-MNIST 14 x 14, 40 % noise, CNN, at equal time, a larger search",
    given=STUDIES["fashion-noise-seconds"].given | {"search_draw": 1},
    trials=32,
    near=16,
    search_seeds=2,
)

_GPU: dict[str, Any] = {"epochs": 60, "device": "cuda", "precision": "bf16"}
_LONG: dict[str, Any] = {"methods": _FEW, "trials": 12, "search_seeds": 1, "seeds": 5}
_VIT_S4 = {"model": "vit-s4", "optimizer": "adamw", "lr": 0.001, "weight_decay": 0.05, "warmup": 1000}

for _data in ("cifar10", "cifar100"):
    STUDIES |= {
        f"{_data}-resnet18": Study(f"{_data}, ResNet-18", _data, _GPU | {"model": "resnet18"}, **_LONG),
        f"{_data}-wrn": Study(f"{_data}, WRN-28-10", _data, _GPU | {"model": "wrn28-10"}, **_LONG),
        f"{_data}-vit": Study(f"{_data}, ViT-S/4, AdamW", _data, _GPU | _VIT_S4, **_LONG),
    }


def near(folder: Path) -> None:
    """Train the second and third best trials of every search of a study with the first five final seeds."""
    from steppe.lab import compare, fair, files, runs
    from steppe.lab.sweep.space import filled

    asks = fair.opened_again(folder)
    if asks is None:
        raise SystemExit(f"{folder} holds no study")
    stages = files.read_json(folder / runs.SEARCH)["stages"]
    points = [(one.method, point["values"]) for one, stage in zip(asks.contestants, stages, strict=True)
              for point in runs.best_first(stage["points"])[1:3]]  # fmt: skip
    methods = dict.fromkeys(filled(method, values) for method, values in points)
    compare.compare(folder / "near", runs.Plan(asks.asked.settings, tuple(methods), 5), workers=1)


def main() -> None:
    """Train a study, or list them."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--study", choices=STUDIES)
    options.add_argument("--out", type=Path, default=Path("runs") / "evidence", help="the folder of the studies")
    options.add_argument("--near", action="store_true", help="train the next two trials of a study that is done")
    options.add_argument("--rest", action="store_true", help="train the methods that a study leaves out")
    given, more = options.parse_known_args()
    if given.study is None:
        print("\n".join(f"{name:24}{study.title}" for name, study in STUDIES.items()))
        return
    sys.path += [str(HERE), str(HERE.parents[1])]  # a study's task is tasks:NAME, its ResNet is that of the benchmarks
    if given.near:
        near(given.out / given.study)
        return
    from steppe.cli import main as steppe

    study, name = STUDIES[given.study], given.study
    if given.rest:
        study, name = study.rest(), f"{name}-rest"
    sys.argv = ["steppe", *study.words(), "--workers", "1", "--out", str(given.out / name), *more]
    steppe()


if __name__ == "__main__":
    main()
