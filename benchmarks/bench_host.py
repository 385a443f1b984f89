"""Host time of a call of `ops.pixel_propagate` on the Triton path, with stubbed launches. It needs no GPU.

    python benchmarks/bench_host.py [CHECKOUT ...]

Times the installed corrmatch, and checkouts with their compiled extensions, in turns. Each runs in a separate process.
Prints microseconds a call, the median over rounds, without the time that the driver takes for a launch.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).resolve().parent
ROUNDS = 7
CHILD = """
import json, sys, time
sys.path.insert(0, sys.argv[1])
import torch
from harness import stub_gpu
from corrmatch import ops
driver = stub_gpu.install()
torch.set_num_threads(1)

def microseconds(call, calls=300):
    call(), call()
    driver.launches.clear()
    call()
    count = len(driver.launches)
    start = time.thread_time()
    for _ in range(calls):
        call()
    return 1e6 * (time.thread_time() - start) / calls, count

found = {}
for dtype in (torch.bfloat16, torch.float32):
    query, key, value, grad = (torch.randn(1, 21, 9, 9).to(dtype) for _ in range(4))
    leaves = [query.clone().requires_grad_(), key.clone().requires_grad_()]
    both = lambda: torch.autograd.grad(ops.pixel_propagate(*leaves, value, backend="triton"), leaves, grad)
    name = str(dtype)[6:]
    found[f"forward, {name}"] = microseconds(lambda: ops.pixel_propagate(query, key, value, backend="triton"))
    gated = lambda: ops.pixel_propagate(query, key, value, threshold=0.5, normalize=True, backend="triton")
    found[f"forward with threshold and mean, {name}"] = microseconds(gated)
    found[f"forward + backward, {name}"] = microseconds(both)
print(json.dumps(found))
"""


def measure(checkout: Path | None) -> dict[str, tuple[float, int]]:
    """Microseconds and launches a call of one checkout, or of the installed corrmatch if it is None."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    if checkout is not None:
        environment["PYTHONPATH"] = str(checkout)
    command = [sys.executable, "-c", CHILD, str(BENCHMARKS)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=BENCHMARKS, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def main(arguments: list[str] | None = None) -> int:
    """Prints the table."""
    named = [Path(x).resolve() for x in (sys.argv[1:] if arguments is None else arguments)]
    checkouts = [None, *named]
    rounds = [[measure(checkout) for checkout in checkouts] for _ in range(ROUNDS)]
    print("microseconds a call (launches): installed" + "".join(f", {checkout.name}" for checkout in named))
    for name in rounds[0][0]:
        cells = [
            (statistics.median(r[i][name][0] for r in rounds), rounds[0][i][name][1]) for i in range(len(checkouts))
        ]
        print(f"{name:46}" + "".join(f"{time:8.0f} ({count})" for time, count in cells))
    return 0


if __name__ == "__main__":
    sys.exit(main())
