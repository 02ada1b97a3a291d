"""The one-line grammar of methods: ``SAM(rho=0.2, m=16)``, ``SGD(epochs=2x)``, ``SAM(lr=0.1, batch_size=32)``.

    spec  = NAME [ "(" key "=" value { "," key "=" value } ")" ]
    key   = a hyper-parameter of the class ``steppe.NAME``; epochs; lr, batch_size or weight_decay of its own
    value = a Python literal; epochs also takes a multiple of the common number, as in 2x

``SGD`` and ``AdamW`` are those optimizers alone; every other method wraps the one that the settings name. Values are
read by ``ast.literal_eval``; no code is run.
"""

import ast
import inspect
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import Any, Unpack, get_type_hints

import torch
from torch import nn

import steppe
from steppe import Adaptive, Fisher, Rule, SharpnessAware, Weighted
from steppe.lab.errors import LabError, unknown
from steppe.lab.settings import Settings
from steppe.options import Parts
from steppe.schedule import Tail

_PLAIN: dict[str, type[torch.optim.Optimizer]] = {"SGD": torch.optim.SGD, "AdamW": torch.optim.AdamW}


def _adaptive_wsam(
    base: torch.optim.Optimizer, rho: float = 0.5, gamma: float = 0.88, eta: float = 0.01, **parts: Unpack[Parts]
) -> SharpnessAware:
    return SharpnessAware(base, Rule(geometry=Adaptive(eta), combine=Weighted(gamma)), rho, **parts)


def _fisher_wsam(
    base: torch.optim.Optimizer, rho: float = 0.1, gamma: float = 0.88, eta: float = 1.0, **parts: Unpack[Parts]
) -> SharpnessAware:
    return SharpnessAware(base, Rule(geometry=Fisher(eta), combine=Weighted(gamma)), rho, **parts)


def _late_sam(
    base: torch.optim.Optimizer, steps: int, rho: float = 0.05, share: float = 0.1, **parts: Unpack[Parts]
) -> SharpnessAware:
    return steppe.SAM(base, Tail(rho, steps, share), **parts)


# WSAM's update with another geometry, which its paper (arXiv 2305.15817) compares in Table 7; SAM in the last share of
# the steps alone (arXiv 2410.10373)
_COMPOSED: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "AdaptiveWSAM": _adaptive_wsam,
    "FisherWSAM": _fisher_wsam,
    "LateSAM": _late_sam,
}
_MULTIPLE = re.compile(r"\d+(?:\.\d+)?x")
SETTINGS = ("lr", "batch_size", "weight_decay")  # of all methods, which a spec may set for its own
_SUPPLIED = ("base", "full", "steps")  # constructor parameters that come from the run, not from the spec


@dataclass(frozen=True)
class Method:
    """A parsed spec; its text is canonical (options in the class's order), so equal methods have equal text."""

    name: str
    options: tuple[tuple[str, object], ...] = ()
    epochs: int | str | None = None
    settings: tuple[tuple[str, object], ...] = ()  # its own values of some of the common settings

    def __str__(self) -> str:
        pairs = [f"{key}={value!r}" for key, value in self.options + self.settings]
        pairs += [] if self.epochs is None else [f"epochs={self.epochs}"]
        return f"{self.name}({', '.join(pairs)})" if pairs else self.name

    @property
    def slug(self) -> str:
        """Return the spec in letters that a file name may have."""
        text = re.sub(r"(?<=\w)=(?=[\w.])", "", str(self).lower())
        return re.sub(r"[^a-z0-9.]+", "-", text.replace("-", "neg")).strip("-")

    def under(self, common: Settings) -> Settings:
        """Return the settings of this method in a comparison with ``common`` ones."""
        own: dict[str, Any] = dict(self.settings)
        return replace(common, **own) if own else common

    def epochs_of(self, common: int) -> int:
        """Return the epochs of this method in a comparison whose common number is ``common``."""
        if isinstance(self.epochs, str):
            return max(1, round(float(self.epochs[:-1]) * common))
        return common if self.epochs is None else self.epochs


# by key: the key that excludes it, and its value where neither is given, which the signature leaves out
_ONE_OF_TWO: dict[str, dict[str, tuple[str, float]]] = {
    "ReweightedSharpness": {"size": ("lam", 64)},
    "XSAM": {"every": ("alpha", 400)},
}


def choices() -> dict[str, Callable[..., torch.optim.Optimizer]]:
    """Return every method by name: plain optimizers, the methods of steppe, and compositions of the laboratory."""
    return {**_PLAIN, **{method.__name__: method for method in steppe.METHODS}, **_COMPOSED}


def defaults_of(name: str) -> dict[str, Any]:
    """Return the keys that a method's spec may set, but epochs, with their defaults."""
    if name in _PLAIN:
        return {}
    parameters = inspect.signature(choices()[name]).parameters.values()
    own = [p for p in parameters if p.kind is not p.VAR_KEYWORD and p.name not in _SUPPLIED]
    documented = {key: value for key, (_, value) in _ONE_OF_TWO.get(name, {}).items()}
    return {p.name: p.default for p in own} | documented | dict.fromkeys(get_type_hints(Parts))


def excluded(name: str, given: Collection[str]) -> set[str]:
    """Return the keys that a method does not take beside those that are given."""
    return {key for key, (other, _) in _ONE_OF_TWO.get(name, {}).items() if other in given}


def options_of(name: str) -> list[str]:
    """Return the keys that a method's spec may set."""
    return [*defaults_of(name), *SETTINGS, "epochs"]


def parse(text: str) -> Method:
    """Return the method of one spec; raise a ``LabError`` that lists the choices if a name is unknown."""
    name, given = _split(text)
    if name not in choices():
        where = "" if name == text else f" in {text!r}"
        raise unknown(f"unknown method {name!r}{where}", name, choices())
    allowed = options_of(name)
    for key in given:
        if key not in allowed:
            raise unknown(f"{name} has no option {key!r} (in {text!r})", key, allowed)
    epochs = _epochs(given.pop("epochs", None), text)
    own, common = (
        tuple((key, given[key]) for key in allowed if key in given and (key in SETTINGS) == is_common)
        for is_common in (False, True)
    )
    return Method(name, own, epochs, common)


def _split(text: str) -> tuple[str, dict[str, object]]:
    quoted = re.sub(rf"(?<==)\s*({_MULTIPLE.pattern})(?=\s*[,)])", r"'\1'", text.strip())
    try:
        node = ast.parse(quoted, mode="eval").body
    except (SyntaxError, ValueError):
        raise _malformed(text) from None
    if isinstance(node, ast.Name):
        return node.id, {}
    if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name)) or node.args:
        raise _malformed(text)
    given = {str(word.arg): _literal(word, text) for word in node.keywords}
    if len(given) < len(node.keywords):
        raise LabError(f"an option is given twice in {text!r}")
    return node.func.id, given


def _literal(word: ast.keyword, text: str) -> object:
    if word.arg is None:
        raise _malformed(text)
    try:
        value = ast.literal_eval(word.value)
    except ValueError:
        value = ...
    if not isinstance(value, int | float | str | None):
        raise LabError(f"{word.arg} in {text!r} must be a plain value such as 0.2, 16, None or 'text'")
    return value


def _malformed(text: str) -> LabError:
    return LabError(f"cannot read method {text!r}; write it as NAME or NAME(key=value, ...), e.g. SAM(rho=0.2, m=16)")


def _epochs(value: object, text: str) -> int | str | None:
    if value is None:
        return None
    multiple = isinstance(value, str) and _MULTIPLE.fullmatch(value) and float(value[:-1]) > 0
    if multiple or (isinstance(value, int) and not isinstance(value, bool) and value > 0):
        return value  # type: ignore[return-value]
    raise LabError(f"epochs in {text!r} must be a positive number or a multiple such as 2x, not {value!r}")


def parse_all(texts: list[str], settings: Settings) -> list[Method]:
    """Return the methods of specs; each is constructed once on a toy model, which refuses bad values."""
    methods = list(dict.fromkeys(parse(text) for text in texts))
    for method in methods:
        try:
            build(method, nn.Linear(2, 2), method.under(settings), full=lambda: torch.zeros(()))
        except (TypeError, ValueError) as error:
            raise LabError(f"{method}: {error}") from error
    return methods


def base_of(settings: Settings) -> str:
    """Return the name of the base optimizer alone."""
    return {"sgd": "SGD", "adamw": "AdamW"}[settings.optimizer]


def build(
    method: Method, model: nn.Module, settings: Settings, full: Callable[[], torch.Tensor]
) -> torch.optim.Optimizer:
    """Return the method's optimizer; ``full`` is the closure over all training examples that n-SAM takes."""
    if method.name in _PLAIN:
        return _plain(method.name, model, settings)
    base = _plain(base_of(settings), model, settings)
    make: Callable[..., torch.optim.Optimizer] = choices()[method.name]
    steps = method.epochs_of(settings.epochs) * settings.steps_per_epoch
    supplied = {"full": full, "steps": steps}
    wanted = {key: value for key, value in supplied.items() if key in inspect.signature(make).parameters}
    return make(base, **dict(method.options), **wanted)


def phases(method: Method, base: str) -> list[tuple[float, Method]]:
    """Return the parts of a method's training as (share of the steps, method): its price is their mean.

    Only ``LateSAM`` has more than one: steps of the base optimizer called ``base``, then of SAM.
    """
    if method.name != "LateSAM":
        return [(1.0, method)]
    options = dict(method.options)
    share = float(options.pop("share", defaults_of("LateSAM")["share"]))  # type: ignore[arg-type]
    late = replace(method, name="SAM", options=tuple(options.items()))
    return [(1 - share, replace(method, name=base, options=())), (share, late)]


def _plain(name: str, model: nn.Module, settings: Settings) -> torch.optim.Optimizer:
    options = {"lr": settings.lr, "weight_decay": settings.weight_decay}
    if name == "SGD":
        options["momentum"] = settings.momentum
    make: Callable[..., torch.optim.Optimizer] = _PLAIN[name]
    return make(model.named_parameters(), **options)
