"""Run the jobs for a GPU: checks, step times, one-process NCCL, and evidence on Fashion-MNIST.

    python -m benchmarks.gpu --device cuda --out gpu --minutes 9
    python -m benchmarks.gpu --device cpu --tiny --out gpu-tiny        # the jobs themselves, in a minute or two

The same command again goes on where the last one stopped. ``--only speed`` runs the jobs whose names begin so. Nothing
is downloaded: ``--data`` names the folder of Fashion-MNIST's idx files, which the evidence needs.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch

from benchmarks.gpu import checks, evidence, speed
from benchmarks.gpu.jobs import Setting, run_all


def main() -> None:
    """Parse the command line and run the jobs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, default=Path("gpu"), help="folder of the jobs' records")
    parser.add_argument("--minutes", type=float, default=9.0, help="no job starts that would not end by then")
    parser.add_argument("--only", default="", help="beginning of the names of the jobs to run")
    parser.add_argument("--data", type=Path, help="folder of Fashion-MNIST's idx files")
    parser.add_argument("--tiny", action="store_true", help="small models, few steps")
    parser.add_argument("--list", action="store_true", help="print the jobs and their seconds, run nothing")
    args = parser.parse_args()
    jobs = [job for job in (*checks.JOBS, *speed.JOBS, *evidence.JOBS) if job.name.startswith(args.only)]
    if args.list:
        print("\n".join(f"{job.seconds:5.0f} s  {job.name}" for job in jobs))
        return
    until = time.monotonic() + 60 * args.minutes
    left = run_all(jobs, Setting(torch.device(args.device), args.tiny, args.data, args.out, until))
    if left:
        print(f"{left} jobs are left: run the same command again")
        sys.exit(3)


if __name__ == "__main__":
    main()
