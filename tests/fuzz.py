"""Random calls of all ops on all backends, compared with the oracle.

    python tests/fuzz.py [--cases 2000] [--seed 0] [--only CASE] [--ops ...] [--backends ...]

The cases run in a separate process, so that crashes and hangs are found, too. For each failure the command that repeats
it is printed. The files of the ops in support/ define cases and agreement.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import signal
import time
import traceback
from collections import Counter
from multiprocessing.connection import Connection

import agreement
import backends
import random_calls
import torch
from emulator import build
from random_inputs import RandomCall

from corrmatch import _C, ops

PATIENCE = 120.0  # seconds that a call may take


def work(seed: int, cases: list[int], names: list[str], only: list[str], pipe: Connection) -> None:
    """Runs the cases. Writes each start and each failure to the pipe: (case, backend, op, text or None)."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # elements that a kernel does not write are NaN
    for index in cases:
        pipe.send((index, "", "", None))
        drawn = random_calls.random_call(seed, index)
        if drawn.name not in names:
            continue
        floating = {x.dtype for x in drawn.tensors.values() if isinstance(x, torch.Tensor) and x.is_floating_point()}
        for target in backends.targets(random_calls.OP_OF[drawn.name]):
            if not floating <= set(target.dtypes) or (only and str(target) not in only):
                continue
            pipe.send((index, str(target), drawn.name, None))
            wrong = attempt(drawn, target)
            if wrong is not None:
                pipe.send((index, str(target), drawn.name, f"{wrong}\n  {drawn}"))
    pipe.send(None)


def attempt(drawn: RandomCall, target: backends.Target) -> str | None:
    """Describes what is wrong with the result of a backend."""
    if target.isa is not None:
        _C.cpu.select_isa(target.isa)
    torch.set_num_threads(1 if target.interpreted else drawn.threads)
    before = {k: x.clone() for k, x in drawn.tensors.items() if isinstance(x, torch.Tensor)}
    try:
        wrong = agreement.disagreement(drawn, target)
    except Exception:  # noqa: BLE001  (whatever it is, it is a finding)
        return "".join(traceback.format_exc(limit=-2))
    for name, x in before.items():
        if not torch.equal(torch.nan_to_num(x), torch.nan_to_num(drawn.tensors[name])):
            return f"{name} was changed"
    return wrong


def fuzz(seed: int, cases: list[int], names: list[str], only: list[str], patience: float = PATIENCE) -> int:
    """Prints failures and a summary, and returns the number of failures. A crash or a hang ends a case, not the run."""
    found, calls, start = 0, Counter(), time.monotonic()
    while cases:
        # A fork is fast, and safe because this process has computed nothing. But a forked process could not use a GPU.
        context = multiprocessing.get_context("spawn" if torch.cuda.is_available() else "fork")
        here, there = context.Pipe(duplex=False)
        worker = context.Process(target=work, args=(seed, cases, names, only, there), daemon=True)
        worker.start()
        there.close()
        index, backend, cases, over = cases[0], "", cases, False
        while not over:
            problem = None
            if not here.poll(patience):
                problem, over = f"no end after {patience:.0f} s", True
                worker.kill()
            else:
                try:
                    report = here.recv()
                except EOFError:
                    worker.join()
                    problem, over = f"the process ended: {ending(worker.exitcode)}", True
                else:
                    if report is None:
                        cases, over = [], True
                        continue
                    index, backend, op, problem = report
                    calls[op, backend] += problem is None and bool(backend)
            if problem is not None:
                found += 1
                print(f"{problem}\n  repeat: python tests/fuzz.py --seed {seed} --only {index} --backends {backend}\n")
            if over:
                cases = [i for i in cases if i > index]
        worker.join()
    for (op, backend), count in sorted((+calls).items()):
        print(f"{op:<22}{backend:<14}{count:6}")
    print(f"seed {seed}: {calls.total()} calls, {found} findings, {time.monotonic() - start:.0f} s")
    return found


def ending(code: int | None) -> str:
    """Describes the end of a process."""
    return signal.Signals(-code).name if code is not None and code < 0 else f"exit code {code}"


def main(arguments: list[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=2000, help="how many (default: 2000)")
    parser.add_argument("--seed", type=int, default=0, help="other cases (default: 0)")
    parser.add_argument("--only", type=int, metavar="CASE", help="this one alone")
    parser.add_argument("--ops", nargs="+", choices=ops.__all__, default=ops.__all__)
    parser.add_argument("--backends", nargs="+", default=[], help="cpu-avx2, triton and so on (default: all)")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        build.extension()  # here, not while a call is timed
    cases = list(range(options.cases)) if options.only is None else [options.only]
    return int(fuzz(options.seed, cases, options.ops, options.backends) > 0)


if __name__ == "__main__":
    raise SystemExit(main())
