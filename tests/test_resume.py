"""Runs that continue others: checkpoints, resumption, phases, weights of another run."""

from __future__ import annotations

import shutil

import pytest
import torch
from training import assert_same, die_in_step, scalars, small_config, stop_after

from corrmatch import cli
from corrmatch.config import ConfigError
from corrmatch.methods import METHODS
from corrmatch.methods.supervised import Supervised
from corrmatch.training import checkpoint
from corrmatch.training.log import Log
from corrmatch.training.trainer import Trainer

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("fresh_process")]


@pytest.fixture(scope="module")
def sample(small_sample):
    return small_sample


RESUMED = ("train.ema=0.9", "train.epochs=2", "train.save_every=3", "train.eval_every=2")


def test_kill_and_resume_is_bit_for_bit_an_uninterrupted_run(sample, tmp_path, monkeypatch):
    whole = small_config(sample, tmp_path / "whole", *RESUMED)
    Trainer(whole).run()

    halves = small_config(sample, tmp_path / "halves", *RESUMED)
    die_in_step(Trainer(halves), 6, monkeypatch)
    assert scalars(tmp_path / "halves")[-1]["step"] == 5
    resumed = Trainer(halves, resume=True)
    assert resumed.step == 3
    resumed.run()

    for kind in ("train", "val"):
        assert scalars(tmp_path / "halves", kind) == scalars(tmp_path / "whole", kind)
    ends = [checkpoint.load(tmp_path / name / "last.pt") for name in ("whole", "halves")]
    for content in ends:
        content.pop("config")
    assert ends[0]["step"] == 8
    assert_same(*ends)


def test_a_checkpoint_holds_what_it_should(sample, tmp_path):
    run = Trainer(small_config(sample, tmp_path / "run", "train.ema=0.9"))
    run.run()
    content = checkpoint.load(tmp_path / "run" / "last.pt")
    expected = {"version", "config", "classes", "step", "phase", "best", "method", "optimizer", "schedule", "random"}
    assert expected == set(content)
    assert content["method"]["theta.threshold"] == run.method.theta.threshold != 0.5
    averaged = content["method"]["average.network.backbone.conv1.0.weight"]
    assert not torch.equal(averaged, content["method"]["model.backbone.conv1.0.weight"])


def test_resume_refuses_other_settings_and_a_new_run_an_old_folder(sample, tmp_path):
    Trainer(small_config(sample, tmp_path / "run")).save(["last.pt"])
    with pytest.raises(ConfigError, match=r"train\.lr: the run to be resumed had 0\.05, not 0\.1"):
        Trainer(small_config(sample, tmp_path / "run", "train.lr=0.1"), resume=True)
    with pytest.raises(ConfigError, match="add --resume"):
        Trainer(small_config(sample, tmp_path / "run"))
    with pytest.raises(ConfigError, match="no such checkpoint"):
        Trainer(small_config(sample, tmp_path / "other"), resume=True)
    Trainer(small_config(sample, tmp_path / "run", "train.log_every=7"), resume=True)


def test_other_classes_than_those_of_the_training_are_refused(sample, tmp_path, capsys):
    shutil.copytree(sample, tmp_path / "data")
    config = small_config(tmp_path / "data", tmp_path / "run")
    Trainer(config).save(["last.pt"])
    names = (tmp_path / "data" / "classes.txt").read_text().splitlines()
    for changed in (names[::-1], [*names[:-1], "sea"]):
        (tmp_path / "data" / "classes.txt").write_text("\n".join(changed))
        message = f"data.classes: the checkpoint was trained with {', '.join(names)}, not with {', '.join(changed)}"
        with pytest.raises(ConfigError, match=f"^{message}$"):
            Trainer(config, resume=True)
        assert cli.main(["eval", str(tmp_path / "run" / "last.pt")]) == 1
        assert capsys.readouterr().err.splitlines()[-1] == f"corrmatch eval: {message}"


def test_a_rotten_checkpoint_is_refused(tmp_path):
    """Whichever bytes have changed, the checkpoint is refused or its content is right."""
    path, content = tmp_path / "x.pt", {"config": "", "classes": ["a", "b"], "method": {"w": torch.arange(5000.0)}}
    torch.save(content, path)
    whole = path.read_bytes()
    weights = whole.find(torch.arange(1.0, 9.0).numpy().tobytes())
    assert weights > 0
    refused = []
    places = [weights, weights + 4000, *torch.randint(len(whole), (150,)).tolist()]
    for place in places:
        for damage in (bytes(40), b"\xff" * 3):
            path.write_bytes(whole[:place] + damage + whole[place + len(damage) :])
            try:
                assert_same(checkpoint.load(path), content)
            except ConfigError as error:
                refused.append(str(error))
    assert set(refused) == {f"{path}: not a checkpoint, or a broken one"}
    assert len(refused) > len(places)
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ConfigError, match="not a checkpoint, or a broken one"):
        checkpoint.load(path)


def test_resuming_drops_lines_of_the_log_that_were_cut(tmp_path):
    path = tmp_path / "scalars.jsonl"
    first = '{"step": 1, "kind": "train", "loss": 1.0}\n'
    ends = ('{"step": 1, "kind": "tr', "\0\0\0\0", "{}\n", "3\n", '{"step": 2, "loss": 0}\n', "\n")
    for end in (b"", b"\xff\xfe", *map(str.encode, ends)):
        path.write_bytes(first.encode() + end)
        log = Log(tmp_path, 1)
        log.add({"loss": torch.tensor(2.0)})
        log.write(2, {})
        assert path.read_text() == first + '{"step": 2, "kind": "train", "loss": 2.0}\n'


class TwoPhases(Supervised):
    """A method with two phases. Some work precedes the second phase, which trains the head alone."""

    def __init__(self, build, config):
        super().__init__(build, config)
        self.began, self.seen = [], []

    def phases(self, epochs):
        return (1, epochs - 1)

    def begin(self, phase, run):
        self.began.append(phase)
        assert run.data.labeled

    def trains(self, phase):
        return list((self.model if phase == 0 else self.model.decode).parameters())

    def forward(self, batch, progress):
        self.seen.append((progress.step, progress.phase, progress.epoch))
        return super().forward(batch, progress)


def test_phases_have_work_before_them_and_rates_of_their_own(sample, tmp_path, monkeypatch):
    monkeypatch.setitem(METHODS, "two_phases", TwoPhases)
    keys = ("method=two_phases", "train.epochs=3", "train.epoch_steps=2", "train.save_every=1", "train.power=1")
    run = Trainer(small_config(sample, tmp_path / "run", *keys))
    run.run()
    assert run.method.began == [0, 1]
    assert run.method.seen == [(0, 0, 0), (1, 0, 0), (2, 1, 1), (3, 1, 1), (4, 1, 2), (5, 1, 2)]
    lines = scalars(tmp_path / "run")
    assert [line["lr_head"] for line in lines] == pytest.approx([0.05, 0.025, 0.05, 0.0375, 0.025, 0.0125])
    assert [line["step"] for line in scalars(tmp_path / "run", "val")] == [2, 6]  # at the end of each phase
    assert not run.optimizer.param_groups[0]["params"]

    # Killed in the second phase and resumed: what was done before the phase is not done again.
    halves = small_config(sample, tmp_path / "halves", *keys)
    die_in_step(Trainer(halves), 5, monkeypatch)
    resumed = Trainer(halves, resume=True)
    assert (resumed.step, resumed.phase, resumed.method.began) == (4, 1, [])
    resumed.run()
    ends = [checkpoint.load(tmp_path / name / "last.pt") for name in ("run", "halves")]
    assert_same(*(content["method"] for content in ends))


def test_a_run_can_start_from_another(sample, tmp_path):
    """All networks of the method start as the evaluated network. A correlation head that it lacks is new."""
    first = Trainer(small_config(sample, tmp_path / "first", "method=supervised", "train.ema=0.5"))
    stop_after(first, 2)
    first.run()
    init = f"model.init={tmp_path / 'first' / 'last.pt'}"
    second = Trainer(small_config(sample, tmp_path / "second", init, "corrmatch.teacher=eval"))
    for network in (second.method.model, second.method.teacher.network):
        for name, x in first.method.average.network.state_dict().items():
            assert torch.equal(network.state_dict()[name], x), name
    with pytest.raises(ConfigError, match=r"model\.init: the run had a network of another shape"):
        Trainer(small_config(sample, tmp_path / "third", init, "model.channels=8"))
    names = "data.classes=[a,b,c,d,e,f]"
    with pytest.raises(ConfigError, match=r"data\.classes: the checkpoint was trained with"):
        Trainer(small_config(sample, tmp_path / "fourth", init, names))


def test_a_resumed_run_needs_no_other_weights(sample, tmp_path):
    """All weights are in its checkpoint, so it reads neither those that it started from nor those of a hub."""
    first = Trainer(small_config(sample, tmp_path / "first", "method=supervised"))
    stop_after(first, 1)
    first.run()
    init = tmp_path / "first" / "last.pt"
    config = small_config(sample, tmp_path / "second", f"model.init={init}")
    second = Trainer(config)
    stop_after(second, 1)
    second.run()
    init.unlink()
    resumed = Trainer(config, resume=True)
    assert resumed.step == 1
    assert_same(resumed.method.state_dict(), second.method.state_dict())
