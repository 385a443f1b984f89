"""The `corrmatch` command."""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import sys

import torch

import corrmatch
from corrmatch.paths import expand

TRAIN_EXTRA = ("timm", "torchvision", "accelerate", "torchmetrics", "omegaconf", "yaml", "tensorboard", "PIL", "tqdm")
EXPORT_EXTRA = ("onnx", "onnxscript")
INSTALL_TRAIN, INSTALL_EXPORT = "pip install 'corrmatch[train]'", "pip install 'corrmatch[export]'"


def info() -> str:
    """Prints what is installed, which backends can run, and why others cannot."""
    lines = [
        f"corrmatch {corrmatch.__version__}",
        f"python    {platform.python_version()} on {platform.machine()} {platform.system()}",
        f"torch     {torch.__version__}, {torch.get_num_threads()} threads",
        f"device    {_device()}",
        "",
        "backend    available  ops",
    ]
    for backend in corrmatch.backends().values():
        note = backend.missing or ", ".join(sorted(backend.ops))
        lines.append(f"{backend.name:<10} {'yes' if backend.available else 'no':<10} {note}")
        if backend.available and backend.detail:
            lines.append(f"{'':<21} ({backend.detail})")
    missing = [name for name in TRAIN_EXTRA if importlib.util.find_spec(name) is None]
    lines += ["", "trainer    " + (f"needs {', '.join(missing)}: {INSTALL_TRAIN}" if missing else "yes"), ""]
    variables = ("CORRMATCH_BACKEND", "CORRMATCH_CHECK")
    lines += [f"{variable:<18} {os.environ.get(variable, 'not set')}" for variable in variables]
    return "\n".join(lines)


def _device() -> str:
    if not torch.cuda.is_available():
        built = f"torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "torch is built without CUDA"
        return f"no GPU ({built})"
    return f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"


def parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    top = argparse.ArgumentParser(prog="corrmatch", description=corrmatch.__doc__.splitlines()[0])
    top.add_argument("--version", action="version", version=corrmatch.__version__)
    commands = top.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="what is installed, which backends can run and why others cannot")

    train = commands.add_parser("train", help="train a network")
    train.add_argument("config", help="a YAML file, or the name of a shipped one: pascal_321, cityscapes, folder, ...")
    train.add_argument("--resume", action="store_true", help="go on from the last checkpoint in work_dir")

    evaluate = commands.add_parser("eval", help="score a trained network on the validation images")
    evaluate.add_argument("checkpoint", type=expand, help="best.pt or last.pt of a run")

    predict = commands.add_parser("predict", help="segment a folder of images")
    predict.add_argument("checkpoint", type=expand, help="best.pt or last.pt of a run")
    predict.add_argument("images", type=expand, help="a folder")
    predict.add_argument("out", type=expand, help="gets the folders index, color and overlay")
    export = commands.add_parser("export", help="write a trained network as a program of its own")
    export.add_argument("checkpoint", type=expand, help="best.pt or last.pt of a run")
    export.add_argument("out", type=expand, help="NAME.pt2, which torch.export.load reads, or NAME.onnx")
    for command in (train, evaluate, predict, export):
        command.add_argument("overrides", nargs="*", metavar="key=value", help="changes, such as train.epochs=10")

    compare = commands.add_parser("compare", help="put runs side by side on a page of HTML")
    compare.add_argument("runs", type=expand, nargs="+", metavar="RUN", help="the work directory of a run")
    compare.add_argument("--out", type=expand, required=True, metavar="FILE", help="the page; replaced if it is there")

    sample = commands.add_parser("sample", help="draw a small data set, for configs/sample.yaml")
    sample.add_argument("folder", type=expand)
    sample.add_argument("--seed", type=int, default=0)
    return top


def run_training(options: argparse.Namespace) -> int:
    """Runs `corrmatch train`, `eval`, `predict`, `export`, `compare` or `sample`."""
    from corrmatch.training import commands

    return commands.run(options)


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    options = parser().parse_args(arguments)
    if options.command == "info":
        sys.stdout.write(info() + "\n")
        return 0
    try:
        return run_training(options)
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in TRAIN_EXTRA + EXPORT_EXTRA:
            raise
        install = INSTALL_TRAIN if missing in TRAIN_EXTRA else INSTALL_EXPORT
        sys.stderr.write(f"corrmatch {options.command} needs {error.name}: {install}\n")
        return 1
