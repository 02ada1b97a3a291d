import pytest
import torch
from torch import nn

import steppe
from steppe.lab import spec
from steppe.lab.errors import LabError
from steppe.lab.runs import Plan, Run
from steppe.lab.settings import Settings
from steppe.lab.train import train


@pytest.mark.parametrize(
    ("text", "canonical", "slug"),
    [
        ("SGD", "SGD", "sgd"),
        ("SGD()", "SGD", "sgd"),
        (" SGD( epochs = 2x ) ", "SGD(epochs=2x)", "sgd-epochs2x"),
        ("SGD(epochs=1.5x)", "SGD(epochs=1.5x)", "sgd-epochs1.5x"),
        ("SAM(m=16, rho=.2)", "SAM(rho=0.2, m=16)", "sam-rho0.2-m16"),
        ("WSAM(epochs=30,gamma=0.9,rho=0.5)", "WSAM(rho=0.5, gamma=0.9, epochs=30)", "wsam-rho0.5-gamma0.9-epochs30"),
    ],
)
def test_canonical_text(text, canonical, slug):
    method = spec.parse(text)
    assert (str(method), method.slug) == (canonical, slug)
    assert spec.parse(str(method)) == method


def test_epochs():
    assert [spec.parse(t).epochs_of(150) for t in ("SGD", "SGD(epochs=2x)", "SGD(epochs=7)")] == [150, 300, 7]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Sam", r"unknown method 'Sam'; did you mean SAM\?"),
        ("Optimizer", r"unknown method 'Optimizer'; choose from SGD, AdamW, .*SAM"),
        ("SAM(k=3)", r"SAM has no option 'k'.*choose from rho, .*lr, batch_size, weight_decay, epochs"),
        ("SGD(rho=1)", r"SGD has no option 'rho'.*choose from lr, batch_size, weight_decay, epochs"),
        ("SAM(0.2)", "cannot read method"),
        ("SAM(**x)", "cannot read method"),
        ("SAM(rho=", "cannot read method"),
        ("steppe.SAM()", "cannot read method"),
        ("SAM(rho=__import__('os').getcwd())", "rho .* must be a plain value"),
        ("SAM(rho=[1])", "rho .* must be a plain value"),
        ("SAM(rho=1, rho=2)", "given twice"),
        ("SAM(epochs=0)", "epochs .* must be a positive number or a multiple"),
        ("SAM(epochs=0x)", "epochs .* must be a positive number or a multiple"),
        ("SAM(epochs=True)", "epochs .* must be a positive number or a multiple"),
        ("SAM(rho=-1)", r"SAM\(rho=-1\): rho must be"),
        ("SAM(rho='a')", "rho must be"),
        ("SAM(m=0)", "m must be a positive integer"),
        ("WSAM(gamma=1.0)", "gamma must be"),
    ],
)
def test_mistakes_are_told_before_anything_runs(text, message):
    with pytest.raises(LabError, match=message):
        spec.parse_all([text], Settings())


def test_equal_methods_count_once():
    assert len(spec.parse_all(["SAM(rho=0.2, m=8)", "SAM(m=8, rho=.2)"], Settings())) == 1


def test_late_sam_is_sam_in_the_last_share_of_its_steps():
    common = Settings(train_size=320, batch_size=32, epochs=2, model="mlp-4")  # 20 steps
    found = train(Run(spec.parse("LateSAM(rho=0.3, share=0.25)"), 0, common))
    assert (found.backwards, found.rho) == (15 + 2 * 5, 0.3)
    assert train(Run(spec.parse("LateSAM(epochs=1)"), 0, common)).backwards == 9 + 2 * 1
    base, late = spec.phases(spec.parse("LateSAM(m=8, share=0.25, lr=0.2)"), "SGD")
    assert (base[0], str(base[1])) == (0.75, "SGD(lr=0.2)")
    assert (late[0], str(late[1])) == (0.25, "SAM(m=8, lr=0.2)")


def test_every_method_of_steppe_can_be_named():
    known = {"SGD", "AdamW", "AdaptiveWSAM", "FisherWSAM", "LateSAM"}
    assert set(spec.choices()) == known | {method.__name__ for method in steppe.METHODS}
    beside_adam = "PreconditionedSAM"
    others = [name for name in spec.choices() if name != beside_adam]
    assert len(spec.parse_all(others, Settings())) == len(others)
    assert spec.parse_all([beside_adam], Settings(optimizer="adamw"))
    with pytest.raises(LabError, match="PreconditionedSAM: this method needs a base optimizer that keeps"):
        spec.parse_all([beside_adam], Settings())


def test_build_passes_the_options():
    model = nn.Linear(3, 2)
    optimizer = spec.build(spec.parse("WSAM(rho=0.3, gamma=0.8, m=4)"), model, Settings(lr=0.2), full=lambda: None)
    expected = steppe.WSAM(torch.optim.SGD(model.parameters(), lr=0.2), rho=0.3, gamma=0.8, m=4)
    assert optimizer.rule == expected.rule
    assert (optimizer.param_groups[0]["rho"], optimizer.param_groups[0]["lr"]) == (0.3, 0.2)


def test_a_method_may_have_settings_of_its_own():
    method = spec.parse("SAM(batch_size=32, rho=0.1, epochs=2x, lr=0.2)")
    assert str(method) == "SAM(rho=0.1, lr=0.2, batch_size=32, epochs=2x)"
    assert spec.parse(str(method)) == method
    own = method.under(Settings(momentum=0.8))
    assert own == Settings(momentum=0.8, lr=0.2, batch_size=32)
    (run,) = Plan(Settings(), (method,), 1).runs()
    assert (run.settings.lr, run.settings.batch_size, run.epochs) == (0.2, 32, 300)
    with pytest.raises(LabError, match="batch-size 2000 exceeds"):
        spec.parse_all(["SGD(batch_size=2000)"], Settings())
