"""The plugin that runs other projects' tests: its stand-ins look like their classes, and make steppe optimizers."""

from tests.processes import Forked

SCRIPT = """
import tools.in_place as plugin, torch, steppe
p = [torch.nn.Parameter(torch.ones(3))]
optimizer = torch.optim.SGD(p, lr=0.1)
assert type(optimizer) is steppe.SAM and optimizer.radius() == 0.0
assert isinstance(optimizer, torch.optim.SGD) and not isinstance(optimizer, torch.optim.Adam)
class Mine(torch.optim.Adam): pass
assert type(Mine(p)) is Mine
assert type(torch.optim.LBFGS(p)).__name__ == "LBFGS"
assert plugin.made == {"SGD": 1} and len(plugin.refused) == 1
"""


def test_stand_ins_are_steppe_optimizers() -> None:
    """In a process of its own, whose torch it changes."""
    output, code = Forked(exec, SCRIPT, {}).end()
    assert code == 0, output
