"""Two studies of our own: error over m, and error at equal wall-clock time."""

from steppe.lab.recipes import shared as s
from steppe.lab.recipes.recipe import Recipe, Study
from steppe.lab.settings import Settings


def _family(radii: tuple[float, ...], *sizes: int) -> tuple[str, ...]:
    return tuple(f"SAM(rho={rho}, m={m})" for rho in radii for m in sizes)


_DIGITS = ("SGD", *_family((0.2, 0.05), 128, 64, 32, 16, 8, 4, 2, 1))
_THOUSAND = (*_DIGITS, *(f"RWSAM(rho=0.2, lam={lam})" for lam in (0.25, 1.0, 4.0)))

M_SHARPNESS = Recipe(
    "m_sharpness",
    "Does error fall with m, and how far down?",
    "SAM (arXiv 2010.01412), section 4.1; RW-SAM (arXiv 2509.18001)",
    (
        ("known", "smaller m generalises better at the same rho; 64 is the m that RW-SAM's authors match"),
        ("data, net, radii, seeds", f"{s.UNREAD} in full; here CIFAR-10 and ResNet-18 with WSAM's training"),
        ("numbers", s.UNREAD),
        ("batch norm", "each micro-batch is normalised by its own statistics"),
        ("laptop", "the digits with 40 % label noise; digits-1000 is in docs/results/recipes.md; else " + s.LAPTOP),
    ),
    paper=(Study("cifar10-resnet18", s.CIFAR10, (s.VANILLA, *_family((0.05, 0.1), 128, 64, 32, 16, 8))),),
    laptop=(
        Study("digits", s.NOISY_DIGITS, _DIGITS),
        Study("digits-1000", Settings(), _THOUSAND, seeds=10),
    ),
)

_TIMED = {
    "sgd": "SGD",
    "sam": "SAM(rho={rho})",
    "wsam": "WSAM(rho={rho}, gamma={gamma})",
    "m8": "SAM(rho=0.2, m=8)",
    "rwsam": "RWSAM(rho={rho})",
    "esam": "ESAM(rho={rho}, beta=0.5, gamma=0.5)",
    "looksam": "LookSAM(rho={rho}, k=5)",
}
_WITH_EPOCHS = tuple(
    f"{text[:-1]}, epochs={{{hole}}})" if "(" in text else f"{text}(epochs={{{hole}}})" for hole, text in _TIMED.items()
)

EQUAL_TIME = Recipe(
    "cost",
    "Which method has the lowest error after equal time on the same machine?",
    "our own; papers give vanilla twice the epochs for the same reason",
    (
        ("time", "that of SGD for twice the epochs; step times are measured first, interleaved, and kept"),
        ("the others", "round(time / their time) epochs, with the cosine over just these"),
        ("reported cost of RW-SAM and ESAM", "7/6 of SAM; 1.4 of the base (abstracts)"),
        ("laptop", "the digits with 40 % label noise; small nets pay for Python, not for arithmetic"),
    ),
    paper=(Study("cifar10-resnet18", s.CIFAR10, _WITH_EPOCHS, values=s.EXAMPLE, timed=_TIMED),),
    laptop=(Study("digits", s.NOISY_DIGITS, _WITH_EPOCHS, values={"rho": 0.5, "gamma": 0.9}, timed=_TIMED),),
)
