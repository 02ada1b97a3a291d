"""Open an Optuna storage so that several processes and machines may share it."""

import logging
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import optuna
from optuna.exceptions import ExperimentalWarning
from optuna.storages import RDBStorage
from sqlalchemy import event
from sqlalchemy.exc import SQLAlchemyError

from steppe.lab.settings import LabError

HEARTBEAT = 10  # seconds; three missed ones mean that the worker is gone
_ATTEMPTS = 5  # at opening: whoever comes first makes the tables, and the others may come while that goes on

optuna.logging.set_verbosity(optuna.logging.WARNING)
logging.getLogger("alembic").setLevel(logging.WARNING)


def open_storage(url: str, heartbeat: int = HEARTBEAT) -> RDBStorage:
    """Open a storage by its URL (sqlite:///FILE, postgresql://..., mysql://...); its tables are made if need be.

    Raises a `LabError` without the URL's password where that fails.
    """
    attempt = 0
    while True:
        try:
            return _opened(url, heartbeat)
        except (SQLAlchemyError, ImportError, ValueError, OSError, RuntimeError) as error:
            attempt += 1
            if attempt == _ATTEMPTS or isinstance(error, ImportError | ValueError):
                reason = str(error).splitlines()[0]
                raise LabError(f"cannot open storage {shown(url)}: {reason}") from error
            time.sleep(0.1 * 2**attempt)


def _opened(url: str, heartbeat: int) -> RDBStorage:
    sqlite = url.startswith("sqlite")
    if sqlite:
        Path(url.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
    options = {"connect_args": {"timeout": 120}} if sqlite else {"pool_pre_ping": True}
    with known_experimental():
        storage = RDBStorage(url, options, heartbeat_interval=heartbeat, grace_period=3 * heartbeat)
    if sqlite:
        _one_writer(storage)
    return storage


@contextmanager
def known_experimental() -> Iterator[None]:
    """Keep Optuna from warning that heartbeats, there since 2.9, may change."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        yield


def _one_writer(storage: RDBStorage) -> None:
    """Take SQLite's write lock before the first read of a transaction: it has no lock on rows to claim a trial with."""

    @event.listens_for(storage.engine, "connect")
    def connect(connection: object, record: object) -> None:
        connection.isolation_level = None  # type: ignore[attr-defined] # the driver begins nothing by itself

    @event.listens_for(storage.engine, "begin")
    def begin(connection: object) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")  # type: ignore[attr-defined]

    storage.engine.dispose()  # connections made before do not know


def shown(url: str) -> str:
    """Return the URL without user and password."""
    head, at, tail = url.rpartition("@")
    return f"{head.split('//')[0]}//...@{tail}" if at else url
