"""Times the training step of corrmatch and the published one in eager PyTorch. Needs `pip install '.[train]'`.

Both steps have the same network, images and positions of regions. They must agree in all terms of the loss and in the
gradients before they are timed, in turns. Parts are timed separately, so their times need not add up to the whole:
    network   forwards (pasted, weak with perturbed, strong; to logits of stride 4, query and key), backward from given
              gradients, and optimiser
    method    all other parts, forward and backward, on recorded outputs of the network (see `step.planted`)
    step      the whole; with --variants ours also with each variant, on top of the previous ones

`--methods` instead times a step of each method, or of the named ones, against that of CorrMatch: passes of networks
with gradient and without, seconds, peak memory.

`--json FILE` writes environment, command, setting, the largest differences, and for each part and contender
peak_extra_bytes, median, spread, rounds and seconds of each round.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from harness import machine, measure, report
from harness.case import CHANNELS, MASKS
from step import methods
from step.planted import PlantedNetwork, StepInputs
from torch import Tensor, nn

from corrmatch.methods import METHODS

LOSS_TOLERANCE, GRADIENT_TOLERANCE = 1e-3, 1e-2  # rounding decides on mask pixels near one half
PARTS = ("network", "method", "step")
OURS = "corrmatch"
VARIANTS = ("bf16", "channels_last", "compile")


def leaves_of(network: PlantedNetwork) -> list[Tensor]:
    """The recorded outputs that get a gradient."""
    return [x for raw in network.planted.values() for x in raw if x is not None and x.requires_grad]


def gradients(inputs: StepInputs, make: Callable[[PlantedNetwork], nn.Module]) -> tuple[dict[str, float], list[Tensor]]:
    """Returns the terms of the loss and the gradients of the recorded outputs."""
    network = inputs.leaves()
    loss, scalars = make(network).train()(inputs.batch, inputs.progress())
    terms = {name: float(scalars[name].detach()) for name in ("x", "x_corr", "s", "kl", "fp", "corr")}
    return terms | {"total": float(loss.detach())}, list(torch.autograd.grad(loss, leaves_of(network)))


def disagreement(inputs: StepInputs) -> tuple[float, float]:
    """The largest relative difference of a term, and of a gradient, between our step and the published one."""
    (ours, our_grads), (theirs, their_grads) = (gradients(inputs, make) for make in (inputs.ours, inputs.published))
    loss = max(abs(ours[name] - theirs[name]) / abs(theirs[name]) for name in theirs)
    pairs = zip(our_grads, their_grads, strict=True)
    return loss, max(float((x - y).norm() / y.norm()) for x, y in pairs)


def method_part(inputs: StepInputs, make: Callable[[PlantedNetwork], nn.Module]) -> Callable[[], Any]:
    """The part of the method: from recorded outputs of the network to their gradients."""
    network = inputs.leaves()
    method = make(network).train()
    leaves = leaves_of(network)

    def run() -> None:
        loss, _ = method(inputs.batch, inputs.progress())
        torch.autograd.grad(loss, leaves)

    return run


def network_part(inputs: StepInputs) -> Callable[[], Any]:
    """The part of the network: its forwards, its backward from given gradients, and the optimiser."""
    network, autocast, optimizer = prepare(inputs)
    b = inputs.batch
    weak_images = torch.cat([b["labeled"]["image"], b["unlabeled"]["weak"]])
    # Random gradients: of constant ones batch norm would leave tiny numbers, which are slow on a CPU.
    upstream = [[None if x is None else 1e-6 * torch.randn_like(x) for x in inputs.planted[n, True]]
                for n in (2 * inputs.options.batch, inputs.options.batch)]  # fmt: skip

    def run() -> None:
        with autocast():
            network.eval()
            with torch.no_grad():
                network(b["mix"]["weak"])
            network.train()
            outs = [
                network(weak_images, perturb=True, correlate=True),
                network(b["unlabeled"]["strong"][:, 0], correlate=True),
            ]
        pairs = [(x, g) for out, grads in zip(outs, upstream, strict=True) for x, g in zip(out, grads, strict=True)
                 if x is not None]  # fmt: skip
        torch.autograd.backward([x for x, _ in pairs], [g.to(x.dtype) for x, g in pairs])
        optimizer.step()
        optimizer.zero_grad()

    return run


def whole_step(
    inputs: StepInputs, make: Callable[[PlantedNetwork], nn.Module], variant: Sequence[str] = ()
) -> Callable[[], Any]:
    """One training step."""
    network, autocast, optimizer = prepare(inputs, variant)
    method = make(network).train()

    def run() -> None:
        with autocast():
            loss, _ = method(inputs.batch, inputs.progress())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


def prepare(
    inputs: StepInputs, variant: Sequence[str] = ()
) -> tuple[PlantedNetwork, Callable[[], Any], torch.optim.Optimizer]:
    """A network in a precision, layout and mode, with its contexts and its optimiser."""
    network = PlantedNetwork(inputs.network(), inputs.planted)
    if "channels_last" in variant:
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if "compile" in variant:
        network.compile()
    optimizer = torch.optim.SGD(network.parameters(), 1e-6, momentum=0.9)
    enabled = "bf16" in variant
    return network, lambda: torch.autocast(inputs.options.device, torch.bfloat16, enabled=enabled), optimizer


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Parses the command line."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--crop", type=int, default=321)
    parser.add_argument("--batch", type=int, default=2, help="labelled images, and as many unlabelled ones (2)")
    parser.add_argument("--backbone", help="of timm (a GPU: resnet101, a CPU: mobilenetv3_small_100)")
    parser.add_argument("--channels", type=int, help="width of pyramid and decoder (a GPU: 256, a CPU: 64)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default=device)
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument("--budget", type=float, default=60.0, help="seconds of timing, roughly (default: 60)")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=[], help="add these, one on another")
    parser.add_argument(
        "--methods", nargs="*", choices=list(METHODS), help="time a step of these (all of them) instead"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures")
    options = parser.parse_args(arguments)
    if options.channels is None:
        options.channels = 256 if options.device == "cuda" else 64
    if options.backbone is None:
        options.backbone = "resnet101" if options.device == "cuda" else "mobilenetv3_small_100"
    return options


def contenders(inputs: StepInputs) -> dict[str, dict[str, Callable[[], Any]]]:
    """The functions that are timed, by part."""
    makers = {OURS: inputs.ours, "published eager": inputs.published}
    found: dict[str, dict[str, Callable[[], Any]]] = {part: {} for part in PARTS}
    for name, make in makers.items():
        found["method"][name] = method_part(inputs, make)
        found["step"][name] = whole_step(inputs, make)
    found["network"]["both"] = network_part(inputs)
    for count, option in enumerate(inputs.options.variants, 1):
        found["step"][f"corrmatch + {option}"] = whole_step(inputs, inputs.ours, inputs.options.variants[:count])
    return found


def main(arguments: list[str] | None = None) -> int:
    """Runs the benchmark; returns the exit code."""
    options = parse(arguments)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    environment = machine.environment(options.device)
    print(f"corrmatch {environment['corrmatch']}, commit {environment['commit']}, torch {environment['torch']}")
    print(f"{environment['device']}, {report.threads(environment)}, {environment['platform']}, {environment['date']}")
    images = f"{options.batch} + {options.batch} images of {options.crop} x {options.crop}"
    network = f"{options.backbone}, output stride 8, {options.channels} channels"
    print(f"{network}, {CHANNELS} classes, {images}, {MASKS} masks, float32")
    if environment["load"] is not None and environment["load"] > 0.5 * environment["threads"]:
        print(f"load {environment['load']:.1f} at the start: other processes run on this machine")
    if options.methods is not None:
        return write(options, arguments, environment, measure_methods(options))
    inputs = StepInputs(options)
    loss, gradient = disagreement(inputs)
    print(f"largest relative difference of a loss term {loss:.1e}, of a gradient {gradient:.1e}")
    if not (loss <= LOSS_TOLERANCE and gradient <= GRADIENT_TOLERANCE):
        print(f"WRONG, nothing timed: bounds are {LOSS_TOLERANCE:.0e} and {GRADIENT_TOLERANCE:.0e}")
        return 1
    print(f"\n{'part':<9}{'contender':<26}{'ms':>9}{'spread':>8}{'per s':>8}{'ratio':>8}{'peak extra MiB':>16}")
    parts = {part: measure_part(part, runs, options) for part, runs in contenders(inputs).items()}
    environment |= {"load_after": machine.load(), "clocks_after": machine.clocks(options.device)}
    print("\nratio: time as a multiple of corrmatch's. peak: memory in use above the level before, during one call.")
    if options.variants:
        print("+: with this on top of what the lines before it add.")
    return write(options, arguments, environment, {"differences": [loss, gradient], "parts": parts})


def write(
    options: argparse.Namespace, arguments: list[str] | None, environment: dict[str, Any], figures: dict[str, Any]
) -> int:
    """Writes all figures, if requested, and returns the exit code."""
    if options.json is not None:
        command = list(sys.argv[1:] if arguments is None else arguments)
        record = {
            "environment": environment,
            "command": command,
            "setting": {k: str(v) for k, v in vars(options).items()},
        }
        options.json.write_text(json.dumps(record | figures, indent=1) + "\n")
    return 0


def measure_methods(options: argparse.Namespace) -> dict[str, Any]:
    """Measures memory and time of a step of each method, and prints a line for each."""
    steps, passes = methods.contenders(options)
    print(f"\n{'method':<22}{'passes':>8}{'ms':>9}{'spread':>8}{'ratio':>8}{'peak extra MiB':>16}")
    peaks = {name: measure.peak_extra_bytes(run, options.device) for name, run in steps.items()}
    samples = race(list(steps.values()), options.budget, options.device)
    found = {name: {"passes": passes[name], "peak_extra_bytes": peaks[name]} | measure.summary(times)
             for name, times in zip(steps, samples, strict=True)}  # fmt: skip
    for name, row in found.items():
        ratio = f"{row['median'] / found[OURS]['median']:.2f}" if OURS in found else ""
        peak = "n/a" if row["peak_extra_bytes"] is None else f"{row['peak_extra_bytes'] / 2**20:.0f}"
        calls = "{with gradient} + {without}".format_map(row["passes"])
        print(f"{name:<22}{calls:>8}{1e3 * row['median']:>9.0f}{100 * row['spread']:>7.0f}%{ratio:>8}{peak:>16}")
    print("\npasses: calls of networks with gradient + without. ratio: time as a multiple of CorrMatch's.")
    return {"methods": found}


def measure_part(part: str, runs: dict[str, Callable[[], Any]], options: argparse.Namespace) -> dict[str, Any]:
    """Measures memory and time of the contenders of a part, and prints a line for each."""
    for run in runs.values():
        run()  # warms up, compiles
    peaks = {name: measure.peak_extra_bytes(run, options.device) for name, run in runs.items()}
    samples = race(list(runs.values()), options.budget / len(PARTS), options.device)
    found = {name: {"peak_extra_bytes": peaks[name]} | measure.summary(times)
             for name, times in zip(runs, samples, strict=True)}  # fmt: skip
    for name, row in found.items():
        ratio = f"{row['median'] / found[OURS]['median']:.2f}" if OURS in found and name != OURS else ""
        peak = "n/a" if row["peak_extra_bytes"] is None else f"{row['peak_extra_bytes'] / 2**20:.0f}"
        print(f"{part:<9}{name:<26}{1e3 * row['median']:>9.0f}{100 * row['spread']:>7.0f}%"
              f"{1 / row['median']:>8.2f}{ratio:>8}{peak:>16}", flush=True)  # fmt: skip
    return found


def race(runs: list[Callable[[], Any]], seconds: float, device: str) -> list[list[float]]:
    """Seconds of each call. The calls take turns, at least three times."""
    samples: list[list[float]] = [[] for _ in runs]
    start = measure.now(device)
    while len(samples[0]) < 3 or measure.now(device) - start < seconds:
        for times, run in zip(samples, runs, strict=True):
            before = measure.now(device)
            run()
            times.append(measure.now(device) - before)
    return samples


if __name__ == "__main__":
    sys.exit(main())
