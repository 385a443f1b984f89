"""The training loop: batches, steps, logs, evaluations, checkpoints. It is the same for all methods."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import accumulate
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device, set_seed
from torch import Tensor, nn
from tqdm import tqdm

from corrmatch.config import Config, ConfigError, to_yaml
from corrmatch.data import classes
from corrmatch.data.datasets import check_files, find_data
from corrmatch.data.streams import Streams, batches
from corrmatch.methods import build_method
from corrmatch.methods.base import Batch, Method, Progress, Run
from corrmatch.models.network import Network
from corrmatch.paths import expand, make_folder
from corrmatch.training import checkpoint, diagnostics
from corrmatch.training.evaluate import Scores, evaluate
from corrmatch.training.log import Log
from corrmatch.training.optimization import make_optimizer, make_schedule, rates
from corrmatch.training.predict import load_model

LAST, BEST = "last.pt", "best.pt"


class Trainer:
    """One training run.

    Args:
        config: Everything about it.
        resume: Go on from the last checkpoint in its work directory.
    """

    def __init__(self, config: Config, *, resume: bool = False):
        train = config.train
        self.config, self.folder = config, expand(config.work_dir)
        self.accelerator = Accelerator(
            cpu=train.cpu, mixed_precision=train.precision, gradient_accumulation_steps=train.accumulate
        )
        self.process, self.processes = self.accelerator.process_index, self.accelerator.num_processes
        self.data = find_data(config.data)
        self.withheld = diagnostics.choose(self.data) if config.eval.pseudo_labels else []
        saved = self._open_folder(resume)
        if self.accelerator.is_main_process:
            self._check_data()
        set_seed(train.seed)
        fresh = saved is None  # otherwise all weights are loaded from the checkpoint
        init = self._initial_weights() if fresh else None
        self.method = self._dress(build_method(config, len(self.data.classes), pretrained=fresh, init=init))
        if self.method.needs_unlabeled and not self.data.unlabeled:
            raise ConfigError(f"data.unlabeled: method {config.method} needs unlabelled images, there are none")
        self.epoch_steps = self._epoch_steps()
        self.ends = [epochs * self.epoch_steps for epochs in accumulate(self.method.phases(train.epochs))]
        self.steps, self.step, self.phase, self.best = self.ends[-1], 0, 0, -math.inf
        self.rates: dict[str, float] = {}
        self.optimizer: torch.optim.Optimizer
        set_seed(train.seed + 1, device_specific=True)
        if saved is None:
            self.method.see_data(self.data)
            self.start_phase(0)
        else:
            self.restore(saved)
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            (self.folder / "config.yaml").write_text(to_yaml(self.config))
        self.log = Log(self.folder, self.step) if self.accelerator.is_main_process else None

    def _initial_weights(self) -> dict[str, Tensor] | None:
        if self.config.model.init is None:
            return None
        network, _, classes = load_model(expand(self.config.model.init))
        checkpoint.check_classes(classes, self.data.classes)
        return network.state_dict()

    def _dress(self, method: Method) -> Method:
        if self.config.train.channels_last:
            method.to(memory_format=torch.channels_last)
        if self.processes > 1 and self.accelerator.device.type == "cuda":
            method = nn.SyncBatchNorm.convert_sync_batchnorm(method)
        method.to(self.accelerator.device)
        for module in method.modules() if self.config.train.compile else ():
            if isinstance(module, Network):
                module.compile()
        return method

    def _epoch_steps(self) -> int:
        train = self.config.train
        if train.epoch_steps is not None:
            return train.epoch_steps
        unlabeled = train.unlabeled_batch_size or train.batch_size
        passes = {"labeled": len(self.data.labeled) / train.batch_size,
                  "unlabeled": len(self.data.unlabeled) / unlabeled}  # fmt: skip
        batches = max(passes.values()) if train.epoch == "longest" else passes[train.epoch]
        return max(1, math.ceil(batches / (train.accumulate * self.processes)))

    def _open_folder(self, resume: bool) -> dict[str, Any] | None:
        """The checkpoint of a run that is resumed, else None. Checks the folder before any image is read."""
        saved = None
        if resume:
            saved = checkpoint.load(self.folder / LAST)
            checkpoint.check_same(self.config, saved, self.processes)
            checkpoint.check_classes(saved["classes"], self.data.classes)
        elif (self.folder / LAST).exists():
            raise ConfigError(
                f"work_dir: {self.folder} holds a run; add --resume to go on with it, or name another one"
            )
        try:
            make_folder(self.folder)
        except ValueError as error:
            raise ConfigError(f"work_dir: {error}") from error
        return saved

    def _check_data(self) -> None:
        """Reads every file, and prints how many pixels each class has."""
        for note in self.data.notes:
            tqdm.write(note, file=sys.stderr)
        if self.config.data.check:
            pixels = check_files(self.data)
            tqdm.write(classes.table(self.data, pixels), file=sys.stderr)
            if not self.config.data.allow_absent:
                classes.require_labels(self.data, pixels)
            classes.require_truth(self.data, pixels)
            check_files(replace(self.data, labeled=[], unlabeled=[], val=self.withheld))

    def start_phase(self, phase: int, *, begin: bool = True) -> None:
        """Starts a phase: the method's work before it, then a new optimiser and schedule.

        If the method `carries_on`, the optimiser keeps its state of parameters that it has trained before.
        """
        self.phase = self.method.phase = phase
        if begin:
            device = self.accelerator.device
            self.method.begin(phase, Run(self.data, self.config, self.folder, device, self.process, self.processes))
        trained = {id(p) for p in self.method.trains(phase)}
        for p in self.method.parameters():
            p.requires_grad_(id(p) in trained)
        start = self.ends[phase - 1] if phase > 0 else 0
        known = self.optimizer.state if phase > 0 and begin and self.method.carries_on else {}
        self.optimizer = make_optimizer(self.method.parameter_groups(self.config.train), self.config.train)
        self.optimizer.state.update({p: known[p] for p in known if id(p) in trained})
        self.schedule = make_schedule(self.optimizer, self.config.train, self.ends[phase] - start)
        self.wrapped, self.stepper = self.accelerator.prepare(self.method, self.optimizer)

    def run(self) -> Scores | None:
        """Trains until the last step and returns the last scores."""
        train, scores, loader = self.config.train, None, None
        bar = tqdm(total=self.steps, initial=self.step, desc="train", disable=None if self.log is not None else True)
        while self.step < self.steps:
            if self.step >= self.ends[self.phase]:
                self.start_phase(self.phase + 1)
                loader = None
            loader = self.loader() if loader is None else loader
            self.advance(loader)
            bar.update()
            if self.step % train.log_every == 0 or self.step in self.ends:
                bar.set_postfix(self.write_log())
            if self.step % (train.eval_every * self.epoch_steps) == 0 or self.step in self.ends:
                scores = self.evaluate()
            elif self.step % train.save_every == 0:
                self.save([LAST])
        bar.close()
        return scores

    def loader(self) -> Iterator[Batch]:
        """The remaining batches of the phase. Each phase may have other streams."""
        train, end = self.config.train, self.ends[self.phase]
        streams = Streams(self.data, self.method.streams(), train, self.process, self.processes)
        return iter(batches(streams, train, self.step * train.accumulate, end * train.accumulate))

    def advance(self, loader: Iterator[Batch]) -> None:
        """One step of the optimiser, without waiting for the device."""
        device = self.accelerator.device
        generator = torch.Generator(device).manual_seed(self.config.train.seed * 1_000_003 + self.step)
        progress = Progress(self.step, self.steps, self.epoch_steps, self.phase, generator)
        self.wrapped.train()
        self.method.before_step(progress)
        for _ in range(self.config.train.accumulate):
            batch = send_to_device(next(loader), device, non_blocking=True)
            with self.accelerator.accumulate(self.wrapped):
                loss, scalars = self.wrapped(batch, progress)
                self.accelerator.backward(loss)
                self.stepper.step()
                self.stepper.zero_grad()
            if self.log is not None:
                self.log.add(scalars)
        self.rates = rates(self.optimizer)
        self.schedule.step()
        self.method.finish_step(progress)
        self.step += 1

    def write_log(self) -> dict[str, str]:
        """Logs the means since the last call; returns some of them for the progress bar."""
        if self.log is None:
            return {}
        means = self.log.write(self.step, self.rates)
        if not math.isfinite(means["loss"]):
            raise FloatingPointError(f"the loss is {means['loss']} at step {self.step}; try a lower train.lr")
        return {name: f"{means[name]:.3f}" for name in ("loss", *self.method.bar) if name in means}

    def evaluate(self) -> Scores:
        """Scores the method's evaluated networks; writes scores and checkpoints."""
        networks = list(self.method.scored.items())
        config, device = self.config, self.accelerator.device
        with self.accelerator.autocast():
            scores = {
                name: evaluate(network, self.data, config, device, self.process, self.processes)
                for name, network in (networks if self.method.score_all else networks[:1])
            }
            if self.log is not None:
                self.log.evaluation(self.step, scores, self.method, networks[0][1], self.data, config, device)
        self._measure_pseudo_labels()
        first = scores[networks[0][0]]
        better = first.miou > self.best
        self.best = max(self.best, first.miou)
        self.save([LAST, BEST] if better else [LAST])
        return first

    def _measure_pseudo_labels(self) -> None:
        """Compares pseudo-labels with masks that training does not use, and logs the result."""
        if not self.withheld:
            return
        device = self.accelerator.device
        with self.accelerator.autocast():
            sums = diagnostics.count(
                self.method, self.withheld, self.data, self.config, device, self.process, self.processes
            )
        sums = self.accelerator.reduce(sums, "sum")
        if self.log is not None:
            self.log.pseudo_labels(self.step, diagnostics.rates(sums, self.data.classes))

    def save(self, names: list[str]) -> None:
        """Writes checkpoints."""
        content = {
            "version": checkpoint.VERSION, "config": to_yaml(self.config), "classes": self.data.classes,
            "step": self.step, "phase": self.phase, "best": self.best, "method": self.method.state_dict(),
            "optimizer": self.optimizer.state_dict(), "schedule": self.schedule.state_dict(),
        }  # fmt: skip
        checkpoint.save([self.folder / name for name in names], content, self.accelerator.is_main_process)

    def restore(self, content: dict[str, Any]) -> None:
        """Restores the state of a checkpoint."""
        self.method.load_state_dict(content["method"])
        self.start_phase(content["phase"], begin=False)
        self.optimizer.load_state_dict(content["optimizer"])
        self.schedule.load_state_dict(content["schedule"])
        self.step, self.best = content["step"], content["best"]
        checkpoint.set_random_state(content["random"][self.process])
