import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    """Small tensors: more threads only wait for one another."""
    torch.set_num_threads(1)


@pytest.fixture
def rehearsed_once(monkeypatch):
    """Models rehearse at their first step alone, for tests that count or spoil single forwards."""
    from steppe.factored import plans

    monkeypatch.setattr(plans.Entry, "due", lambda *_: False)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
