"""Every test starts without accelerate's process-wide state."""

import pytest

from .helpers import reset_accelerate


@pytest.fixture(autouse=True)
def _new_state():
    yield
    reset_accelerate()
