"""The training loop: devices, optimisation, evaluation, checkpoints. It knows no method."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device, set_seed
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from corrmatch.config import Config, ConfigError, to_yaml
from corrmatch.data.datasets import check_files, find_data
from corrmatch.data.streams import Streams, batches
from corrmatch.training import checkpoint
from corrmatch.training.evaluate import Scores, evaluate
from corrmatch.training.log import Log
from corrmatch.training.methods import Batch, Method, build_method

LAST, BEST = "last.pt", "best.pt"
GROUPS = ("backbone", "head")


class Trainer:
    """One run.

    Args:
        config: Everything about it.
        resume: Go on from the last checkpoint in its work directory.
    """

    def __init__(self, config: Config, *, resume: bool = False):
        train = config.train
        self.config, self.folder = config, Path(config.work_dir)
        self.accelerator = Accelerator(
            cpu=train.cpu, mixed_precision=train.precision, gradient_accumulation_steps=train.accumulate
        )
        self.process, self.processes = self.accelerator.process_index, self.accelerator.num_processes
        self.data = find_data(config.data)
        if config.data.check and self.accelerator.is_main_process:
            check_files(self.data)
        set_seed(train.seed)
        method = build_method(config, len(self.data.classes))
        if not self.data.unlabeled and "unlabeled" in method.streams:
            raise ConfigError(f"data.unlabeled: method {config.method} needs unlabelled pictures, there are none")
        self.method = self._dress(method)
        self.ema = None
        if train.ema is not None:
            self.ema = AveragedModel(method.model, multi_avg_fn=get_ema_multi_avg_fn(train.ema), use_buffers=True)
        groups: tuple[list[nn.Parameter], ...] = ([], [])  # backbones, and all else, of whatever networks there are
        for name, parameter in method.named_parameters():
            groups["backbone" not in name.split(".")].append(parameter)
        self.optimizer = torch.optim.SGD(
            [{"params": groups[0], "lr": train.lr}, {"params": groups[1], "lr": train.lr * train.lr_multi}],
            momentum=train.momentum, weight_decay=train.weight_decay,
        )  # fmt: skip
        pictures = max(len(self.data.labeled), len(self.data.unlabeled))
        self.epoch_steps = math.ceil(pictures / (train.batch_size * train.accumulate * self.processes))
        self.steps = train.epochs * self.epoch_steps
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: (1 - step / self.steps) ** train.power if step < self.steps else 0.0
        )
        self.wrapped, self.stepper = self.accelerator.prepare(self.method, self.optimizer)
        self.step, self.best, self.rates = 0, -1.0, [0.0] * len(GROUPS)
        set_seed(train.seed + 1, device_specific=True)
        self._open_folder(resume)
        self.log = Log(self.folder, self.step) if self.accelerator.is_main_process else None

    def _dress(self, method: Method) -> Method:
        if self.config.train.channels_last:
            method.to(memory_format=torch.channels_last)
        if self.processes > 1 and self.accelerator.device.type == "cuda":
            method = nn.SyncBatchNorm.convert_sync_batchnorm(method)
        method.to(self.accelerator.device)
        if self.config.train.compile:
            method.model.compile()
        return method

    def _open_folder(self, resume: bool) -> None:
        if resume:
            self.restore(checkpoint.load(self.folder / LAST))
        elif (self.folder / LAST).exists():
            raise ConfigError(
                f"work_dir: {self.folder} holds a run; add --resume to go on with it, or name another one"
            )
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / "config.yaml").write_text(to_yaml(self.config))

    def run(self) -> Scores | None:
        """Trains to the end; returns the last scores."""
        train, scores = self.config.train, None
        streams = Streams(self.data, self.method.streams, train.crop, train.seed)
        first, end = self.step * train.accumulate, self.steps * train.accumulate
        loader = iter(batches(streams, train, first, end, self.process, self.processes))
        bar = tqdm(total=self.steps, initial=self.step, desc="train", disable=None if self.log is not None else True)
        while self.step < self.steps:
            self.advance(loader)
            bar.update()
            if self.step % train.log_every == 0 or self.step == self.steps:
                bar.set_postfix(self.write_log())
            if self.step % (train.eval_every * self.epoch_steps) == 0 or self.step == self.steps:
                scores = self.evaluate()
            elif self.step % train.save_every == 0:
                self.save([LAST])
        bar.close()
        return scores

    def advance(self, loader: Iterator[Batch]) -> None:
        """One step of the optimiser. Nothing here waits for the device."""
        device = self.accelerator.device
        generator = torch.Generator(device).manual_seed(self.config.train.seed * 1_000_003 + self.step)
        self.wrapped.train()
        for _ in range(self.config.train.accumulate):
            batch = send_to_device(next(loader), device, non_blocking=True)
            with self.accelerator.accumulate(self.wrapped):
                loss, scalars = self.wrapped(batch, generator)
                self.accelerator.backward(loss)
                self.stepper.step()
                self.stepper.zero_grad()
            if self.log is not None:
                self.log.add(scalars)
        self.rates = [float(rate) for rate in self.schedule.get_last_lr()]
        self.schedule.step()
        self.step += 1
        if self.ema is not None:
            self.ema.update_parameters(self.method.model)

    def write_log(self) -> dict[str, str]:
        """Means since the last time, to the log; for the progress bar a few of them."""
        if self.log is None:
            return {}
        rates = {f"lr_{name}": rate for name, rate in zip(GROUPS, self.rates, strict=True)}
        means = self.log.write(self.step, rates)
        if not math.isfinite(means["loss"]):
            raise FloatingPointError(f"the loss is {means['loss']} at step {self.step}; try a lower train.lr")
        return {name: f"{means[name]:.3f}" for name in ("loss", "threshold", "reliable") if name in means}

    def evaluate(self) -> Scores:
        """Scores the network, averaged where it is, writes them and the checkpoints."""
        model = self.method.model if self.ema is None else self.ema.module
        with self.accelerator.autocast():
            scores = evaluate(model, self.data, self.config, self.accelerator.device, self.process, self.processes)
            if self.log is not None:
                self.log.scores(self.step, scores)
                self.log.panels(self.step, self.method, model, self.data, self.config, self.accelerator.device)
        better = scores.miou > self.best
        self.best = max(self.best, scores.miou)
        self.save([LAST, BEST] if better else [LAST])
        return scores

    def save(self, names: list[str]) -> None:
        """Writes checkpoints."""
        content = {
            "config": to_yaml(self.config), "classes": self.data.classes, "step": self.step, "best": self.best,
            "method": self.method.state_dict(), "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(), "ema": None if self.ema is None else self.ema.state_dict(),
        }  # fmt: skip
        checkpoint.save([self.folder / name for name in names], content, self.accelerator.is_main_process)

    def restore(self, content: dict[str, Any]) -> None:
        """Goes back to where a checkpoint was written."""
        checkpoint.check_same(self.config, content, self.processes)
        self.method.load_state_dict(content["method"])
        self.optimizer.load_state_dict(content["optimizer"])
        self.schedule.load_state_dict(content["schedule"])
        if self.ema is not None:
            self.ema.load_state_dict(content["ema"])
        self.step, self.best = content["step"], content["best"]
        checkpoint.set_random_state(content["random"][self.process])
