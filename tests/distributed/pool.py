"""Processes that run the same function, one a rank, over gloo; started once for many tests."""

from __future__ import annotations

import socket
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import distributed as dist

from tests.processes import processes


class Pool:
    """``pool(f, *args)`` runs ``f(*args)`` on every rank and gives their answers, in order of rank."""

    def __init__(self, n: int) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        context = processes()
        self.pipes: list[Connection] = []
        self.processes = []
        for rank in range(n):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(rank, n, port, there), daemon=True)
            process.start()
            self.pipes.append(here)
            self.processes.append(process)

    def __call__(self, f: Callable[..., Any], *args: Any) -> list[Any]:
        for pipe in self.pipes:
            pipe.send((f, args))
        answers = [pipe.recv() if pipe.poll(120) else (False, "no answer in two minutes") for pipe in self.pipes]
        failed = [f"rank {rank}: {answer}" for rank, (fine, answer) in enumerate(answers) if not fine]
        if failed:
            raise AssertionError("\n".join(failed))
        return [answer for _, answer in answers]

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()


def _serve(rank: int, n: int, port: int, pipe: Connection) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=n, timeout=timedelta(seconds=60)
    )
    while True:
        f, args = pipe.recv()
        torch.manual_seed(0)
        try:
            with warnings.catch_warnings():  # a test's filters are its own
                answer = (True, f(*args))
        except BaseException:
            answer = (False, traceback.format_exc())
        pipe.send(answer)
