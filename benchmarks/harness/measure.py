"""How things are measured: interleaved timing and peak memory."""

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

LEAST_ROUNDS = 5  # for corrmatch and for every peer that is not far behind
LEAST_ROUNDS_SLOW = 2  # for a contender that takes more than SLOW times as long as the fastest
SLOW = 4.0
MOST_ROUNDS = 300
REPLAYS = 5  # of a CUDA graph in one sample


@dataclass
class Contender:
    """One way to compute an op on given inputs.

    Attributes:
        name: What the table calls it.
        forward: Computes the result.
        leaves: The inputs whose gradients are wanted; empty where there is no backward to measure.
        upstream: Gradient of the result, for the backward.
        family: Variants of one contender share a family; only the fastest of it is raced.
        ours: Whether this is corrmatch.
        missing: Why it cannot run here; None where it can.
        answer: What is compared with the oracle, where that is not simply the result and the gradients.
        on_host: Whether it computes or reads something on the host, so that no CUDA graph can hold it.
        compiles: Whether torch.compile makes it: it takes longest to start, so it comes after all others.
        graphs: CUDA graphs of the passes, once captured.
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
        """What can be timed."""
        eager = ("forward", "backward", "both") if self.leaves else ("forward",)
        return *eager, *(f"{name}_graph" for name in self.graphs)

    def capture(self) -> None:
        """Captures forward and, where there are leaves, both in CUDA graphs, which replay without launch overhead."""
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
        """The result and, where there are leaves, the gradients."""
        if not self.leaves:
            with torch.no_grad():
                return (self.forward(),)
        out = self.forward()
        return out.detach(), *torch.autograd.grad(out, self.leaves, self.upstream)


def now(device: str) -> float:
    """Seconds, once the device has done all it was given."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def sample(contender: Contender, device: str) -> dict[str, float]:
    """Seconds of one call of each pass.

    The forward alone runs without a graph. The backward is timed on the graph that a forward has just built, as in
    training, so its time includes releasing that graph.
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
    """Seconds of one replay by the device's clock, the mean of some in a row."""
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
    """Times contenders against each other: yields a contender's number and the seconds of a round by pass.

    The next to run is always the one that has had the least time so far. So all get the same share of the time, the
    rounds of a slow contender are spread over the whole race among many rounds of the fast ones, and whatever else the
    machine does meanwhile hits all of them alike. One that raises is out, and the error comes in place of its round.
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
    """Median, spread (half the interquartile range over the median) and the samples themselves."""
    middle = statistics.median(seconds)
    spread = 0.0
    if len(seconds) > 1:
        low, _, high = statistics.quantiles(seconds, n=4, method="inclusive")
        spread = (high - low) / 2 / middle
    return {"median": middle, "spread": spread, "rounds": len(seconds), "seconds": seconds}


def peak_extra_bytes(call: Callable[[], Any], device: str) -> int | None:
    """Most memory in use during the call above the level before it, the result included; None where unknown.

    On a GPU that is what torch has allocated. On a CPU it is resident memory, which counts the allocations of torch and
    of any extension alike; the heap is trimmed first, so that nothing is served from memory freed earlier. The
    kernel counts to within about half a MiB.
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
        reset.write_text("5")  # sets the peak back to the present level
    except OSError:  # some containers forbid it
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
    """Memory that can still be had; None where unknown."""
    if device == "cuda":
        torch.cuda.empty_cache()  # what the allocator keeps for later counts as taken
        return torch.cuda.mem_get_info()[0]
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return None
    fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
    return int(fields["MemAvailable"].split()[0]) * 1024
