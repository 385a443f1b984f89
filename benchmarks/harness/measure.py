"""Measurement: interleaved timing and peak memory."""

from __future__ import annotations

import ctypes
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

LEAST_ROUNDS = 5  # for corrmatch and for peers that are not much slower
LEAST_ROUNDS_SLOW = 2  # for contenders that take more than SLOW times as long as the fastest
SLOW = 4.0
MOST_ROUNDS = 300
REPLAYS = 5  # of a CUDA graph in one sample


@dataclass
class Contender:
    """An implementation of an op, with given inputs.

    Attributes:
        name: Its name in the table.
        forward: Computes the result.
        leaves: Inputs whose gradients are computed; empty if the backward is not measured.
        upstream: Gradient of the result, for the backward.
        family: Variants of a contender have the same family. Only the fastest of a family is timed in full.
        ours: Whether this is corrmatch.
        missing: The reason why it cannot run here; None if it can.
        answer: Computes the values for the comparison with the oracle, if they are not the result and the gradients.
        on_host: Whether it computes or reads something on the host, so that it cannot be captured in a CUDA graph.
        compiles: Whether torch.compile compiles it. Such contenders are slow to start and come last.
        graphs: CUDA graphs of the passes, after they were captured.
    """

    name: str
    forward: Callable[[], Any]
    leaves: tuple[Tensor, ...] = ()
    upstream: Tensor | None = None
    family: str | None = None
    ours: bool = False
    missing: str | None = None
    answer: Callable[[], tuple[Any, ...]] | None = None

    on_host: bool = False
    compiles: bool = False
    graphs: dict[str, torch.cuda.CUDAGraph] = field(default_factory=dict)

    @property
    def passes(self) -> tuple[str, ...]:
        """The passes that can be timed."""
        eager = ("forward", "backward", "both") if self.leaves else ("forward",)
        return *eager, *(f"{name}_graph" for name in self.graphs)

    def capture(self) -> None:
        """Captures forward and, if there are leaves, both in CUDA graphs, which replay without launch overhead."""
        calls = {"forward": torch.no_grad()(self.forward)} | ({"both": self.both} if self.leaves else {})
        for name, call in calls.items():
            graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()
            with torch.cuda.stream(side):  # compiles and allocates before the capture
                call()
            torch.cuda.synchronize()
            with torch.cuda.graph(graph):
                call()
            self.graphs[name] = graph

    def both(self) -> tuple[Any, ...]:
        """The result and, if there are leaves, the gradients."""
        if not self.leaves:
            with torch.no_grad():
                return (self.forward(),)
        out = self.forward()
        return out.detach(), *torch.autograd.grad(out, self.leaves, self.upstream)


def now(device: str) -> float:
    """The time in seconds, after the device has finished its work."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def sample(contender: Contender, device: str) -> dict[str, float]:
    """Seconds of one call of each pass.

    The forward is timed without an autograd graph. The backward is timed with the graph that a forward has just built,
    as in training, so its time includes the release of this graph.
    """
    start = now(device)
    with torch.no_grad():
        out = contender.forward()
    times = {"forward": now(device) - start}
    if contender.leaves:
        del out
        start = now(device)
        out = contender.forward()
        middle = now(device)
        grads = torch.autograd.grad(out, contender.leaves, contender.upstream)
        end = now(device)
        del grads
        times |= {"backward": end - middle, "both": end - start}
    for name, graph in contender.graphs.items():
        times[f"{name}_graph"] = replay_seconds(graph)
    return times


def replay_seconds(graph: torch.cuda.CUDAGraph) -> float:
    """Seconds of one replay by the clock of the device, the mean of several in a row."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(REPLAYS):
        graph.replay()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3 / REPLAYS


def race(
    contenders: list[Contender], seconds: float, device: str
) -> Iterator[tuple[int, dict[str, float] | Exception]]:
    """Times contenders in turns. Yields the number of a contender and the seconds of a round by pass.

    The contender with the least time up to now runs next. So all have the same share of the time, and rounds of slow
    contenders are spread among rounds of fast ones. Other load on the machine affects all of them equally. A contender
    that raises an error is not run again, and the error is yielded in place of its round.
    """
    running = list(range(len(contenders)))
    spent, rounds = [0.0] * len(contenders), [0] * len(contenders)
    deadline = time.perf_counter() + seconds

    def least(i: int) -> int:
        fastest = min(spent[j] / rounds[j] if rounds[j] > 0 else 0.0 for j in running)
        slow = rounds[i] > 0 and spent[i] / rounds[i] > SLOW * fastest and not contenders[i].ours
        return LEAST_ROUNDS_SLOW if slow else LEAST_ROUNDS

    while True:
        waiting = [i for i in running if rounds[i] < MOST_ROUNDS]
        if time.perf_counter() > deadline:
            waiting = [i for i in waiting if rounds[i] < least(i)]
        if not waiting:
            return
        i = min(waiting, key=spent.__getitem__)
        start = time.perf_counter()
        try:
            times: dict[str, float] | Exception = sample(contenders[i], device)
        except Exception as error:  # noqa: BLE001 - whatever it is, the others go on
            running.remove(i)
            times = error
        spent[i] += time.perf_counter() - start
        rounds[i] += 1
        yield i, times


def summary(seconds: list[float]) -> dict[str, Any]:
    """Median, spread (half the interquartile range over the median) and the samples."""
    middle = statistics.median(seconds)
    spread = 0.0
    if len(seconds) > 1:
        low, _, high = statistics.quantiles(seconds, n=4, method="inclusive")
        spread = (high - low) / 2 / middle
    return {"median": middle, "spread": spread, "rounds": len(seconds), "seconds": seconds}


def peak_extra_bytes(call: Callable[[], Any], device: str) -> int | None:
    """Peak memory of a call, with its result, above the level before it; None if unknown.

    On a GPU this is memory allocated by torch. On a CPU it is resident memory, which has the allocations of torch and
    of all extensions. The heap is trimmed first, so that no memory freed earlier is used again. The count of the
    kernel is accurate to about half a MiB.
    """
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    reset = Path("/proc/self/clear_refs")
    if platform.system() != "Linux" or not reset.exists():
        return None
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):  # glibc
        libc.malloc_trim(0)
    try:
        reset.write_text("5")  # resets the peak to the present level
    except OSError:  # not allowed in some containers
        return None
    before = _resident_bytes("VmRSS")
    call()
    return max(0, _resident_bytes("VmHWM") - before)


def _resident_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise LookupError(f"/proc/self/status has no {field}")


def available_bytes(device: str) -> int | None:
    """Free memory; None if unknown."""
    if device == "cuda":
        torch.cuda.empty_cache()  # memory that the allocator keeps is not free
        return torch.cuda.mem_get_info()[0]
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return None
    fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
    return int(fields["MemAvailable"].split()[0]) * 1024
