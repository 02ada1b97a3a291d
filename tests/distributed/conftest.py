import pytest

from tests.distributed.pool import Pool


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
