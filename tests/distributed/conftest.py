import pytest

from tests.distributed.pool import Pool


def pytest_collection_modifyitems(items) -> None:
    """Ranks are started in one worker of xdist alone, whose tests share them."""
    for item in items:
        if {"two_ranks", "four_ranks"} & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.xdist_group("ranks"))


@pytest.fixture(scope="session")
def two_ranks():
    pool = Pool(2)
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def four_ranks():
    pool = Pool(4)
    yield pool
    pool.close()
