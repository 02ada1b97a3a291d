"""Methods at equal wall-clock time: each trains as many epochs as vanilla's time allows it."""

from dataclasses import replace

from steppe.lab.recipes import protocol as p
from steppe.lab.recipes.frame import Recipe, Scale, Study

METHODS = {
    "sgd": "SGD",
    "sam": "SAM(rho={rho})",
    "wsam": "WSAM(rho={rho}, gamma={gamma})",
    "m8": "SAM(rho=0.2, m=8)",
    "rwsam": "RWSAM(rho={rho})",
    "esam": "ESAM(rho={rho}, beta=0.5, gamma=0.5)",
    "looksam": "LookSAM(rho={rho}, k=5)",
}


def studies(scale: Scale) -> tuple[Study, ...]:
    """Return the methods with epochs to be timed, and SAM at twice the time beside them."""
    methods = tuple(f"{text[:-1]}, epochs={{{hole}}})" if "(" in text else f"{text}(epochs={{{hole}}})"
                    for hole, text in METHODS.items())  # fmt: skip
    if scale == "laptop":
        values = {"rho": 0.5, "gamma": 0.9}
        return (Study("digits", p.NOISY_DIGITS, methods, values=values, timed=METHODS),)
    settings = p.CIFAR10 if scale == "paper" else replace(p.HOUR, epochs=12)
    return (Study("cifar10-resnet18", settings, methods, 5 if scale == "paper" else 3, p.EXAMPLE, timed=METHODS),)


RECIPE = Recipe(
    "cost",
    "Which method has the lowest error after equal time on the same machine?",
    "our own; papers give vanilla twice the epochs for the same reason",
    (
        ("time", "that of SGD for twice the epochs; step times are measured first, interleaved, and kept"),
        ("the others", "round(time / their time) epochs, with the cosine over just these"),
        ("reported cost of RW-SAM and ESAM", "7/6 of SAM; 1.4 of the base (abstracts)"),
        ("smaller scales", "the digits with 40 % label noise; small nets pay for Python, not for arithmetic"),
    ),
    studies,
)
