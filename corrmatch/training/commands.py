"""The commands train, eval, predict, export, compare and sample."""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import replace
from typing import cast

from accelerate import Accelerator

from corrmatch.config import Config, ConfigError, load_config
from corrmatch.data import classes
from corrmatch.data.datasets import DataError, check_files, find_data
from corrmatch.data.sample import draw_sample
from corrmatch.models.network import Network
from corrmatch.training import checkpoint
from corrmatch.training.evaluate import evaluate
from corrmatch.training.export import export
from corrmatch.training.page import compare
from corrmatch.training.predict import load_model, predict
from corrmatch.training.trainer import BEST, LAST, Trainer


def run(options: argparse.Namespace) -> int:
    """Runs a command and returns its exit code. An error that the user can fix is printed as one line."""
    try:
        COMMANDS[options.command](options)
    except (ConfigError, DataError, FloatingPointError, OSError) as error:
        # An error in a process of a data loader has that process's traceback before its message.
        said = str(error).rpartition(f"{type(error).__name__}: ")[2].strip()
        sys.stderr.write(f"corrmatch {options.command}: {said}\n")
        return 1
    return 0


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")


def _train(options: argparse.Namespace) -> None:
    trainer = Trainer(load_config(options.config, options.overrides), resume=options.resume)
    scores = trainer.run()
    if trainer.log is not None:
        if scores is not None:
            _say(scores.table())
        if math.isfinite(trainer.best):
            _say(f"best mean IoU {100 * trainer.best:.2f}: {trainer.folder / BEST}")
        else:
            _say(f"no mean IoU, so no {BEST}: no pixel of a class in the validation masks; {trainer.folder / LAST}")


def _evaluate(options: argparse.Namespace) -> None:
    model, config, names = load_model(options.checkpoint, options.overrides)
    accelerator = _accelerator(config)
    data = replace(find_data(config.data), labeled=[], unlabeled=[])
    checkpoint.check_classes(names, data.classes)
    if config.data.check and accelerator.is_main_process:
        classes.require_truth(data, check_files(data))
    model.to(accelerator.device)
    with accelerator.autocast():
        scores = evaluate(model, data, config, accelerator.device, accelerator.process_index, accelerator.num_processes)
    if accelerator.is_main_process:
        _say(scores.table())


def _predict(options: argparse.Namespace) -> None:
    model, config, names = load_model(options.checkpoint, options.overrides)
    accelerator = _accelerator(config)
    with accelerator.autocast():
        count = predict(model, config, names, options.images, options.out, accelerator.device)
    _say(f"{count} images: {options.out}")


def _export(options: argparse.Namespace) -> None:
    model, _, names = load_model(options.checkpoint, options.overrides)
    export(cast(Network, model), names, options.out)
    _say(str(options.out))


def _accelerator(config: Config) -> Accelerator:
    return Accelerator(cpu=config.train.cpu, mixed_precision=config.train.precision)


def _compare(options: argparse.Namespace) -> None:
    for row in compare(options.runs, options.out):
        mean, deviation = row.last("miou")
        around = "" if math.isnan(deviation) else f" ± {100 * deviation:.2f}"
        _say(f"{row.letter}  {100 * mean:6.2f}{around:<8}  {len(row.runs)} x {row.name}")
    _say(str(options.out))


def _sample(options: argparse.Namespace) -> None:
    draw_sample(options.folder, options.seed)
    _say(f"{options.folder}: now run corrmatch train sample data.root={options.folder}")


COMMANDS = {
    "train": _train,
    "eval": _evaluate,
    "predict": _predict,
    "export": _export,
    "compare": _compare,
    "sample": _sample,
}
