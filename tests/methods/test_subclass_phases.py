"""The work of subclass between its phases: killed, resumed, shared, corrupted. Then the second phase."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from child import in_two_processes
from PIL import Image
from recordings import progress
from training import assert_same, die_in_step, scalars, small_config

from corrmatch.data.datasets import IGNORE, DataError, find_data
from corrmatch.methods import build_method
from corrmatch.methods.base import Run
from corrmatch.methods.parts import subclass_maps as stage
from corrmatch.methods.parts.labelling import fingerprint
from corrmatch.methods.parts.pseudo_labels import nearest
from corrmatch.methods.subclass import parents_of
from corrmatch.training import checkpoint
from corrmatch.training.predict import load_model
from corrmatch.training.trainer import Trainer

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("fresh_process")]

RUN = (
    "method=subclass", "subclass.threshold=0.3", "subclass.base=160", "subclass.counts=[5,1,2,1,3,1]",
    "train.eval_every=4", "train.save_every=2",
)  # fmt: skip
WORK = ("features", "balanced_kmeans", "write")  # called for each image, for each class that is divided, for each map


@pytest.fixture(scope="module")
def sample(small_sample):
    return small_sample


@pytest.fixture(scope="module")
def whole(sample, tmp_path_factory):
    """A run without interruption, and the number of calls of each kind of work."""
    AcceleratorState._reset_state(reset_partial_state=True)
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        calls = counted(patch)
        run = Trainer(small_config(sample, folder, *RUN))
        run.run()
    return run, calls


def counted(patch, *, die_at=None):
    """Counts the pieces of work, and raises in the n-th of one kind."""
    calls = dict.fromkeys(WORK, 0)

    def wrapped(name, function):
        def call(*arguments, **options):
            if die_at == (name, calls[name]):
                raise KeyboardInterrupt
            calls[name] += 1
            return function(*arguments, **options)

        return call

    for name in WORK:
        place = stage.Maps if name == "write" else stage
        patch.setattr(place, name, wrapped(name, getattr(place, name)))
    return calls


def test_a_run_goes_through_both_phases(sample, whole, tmp_path):
    run, calls = whole
    counts = run.method.counts
    assert counts == [5, 1, 2, 1, 3, 1]
    assert calls == {"features": 5, "balanced_kmeans": 3, "write": 5}
    folder = run.folder / "subclasses"
    assert sorted(path.name for path in folder.iterdir()) == [*(f"{i:06}.png" for i in range(5)), "maps.json"]
    said = json.loads((folder / "maps.json").read_text())
    assert (said["counts"], said["classes"]) == (counts, run.data.classes)
    # Subclasses are those of the class at the nearest position of stride 8, and of equal size.
    found = []
    for i, item in enumerate(run.data.labeled):
        drawn = np.asarray(Image.open(folder / f"{i:06}.png"))
        shrunk = stage.shrunk(item, run.data)
        small = nearest(torch.from_numpy(drawn.copy())[None], shrunk.shape)[0]
        parents = torch.cat([parents_of(counts), torch.full((256 - sum(counts),), IGNORE)])
        assert torch.equal(parents[small.long()], torch.from_numpy(shrunk).long())
        enlarged = nearest(small[None], drawn.shape)[0]
        assert torch.equal(enlarged, torch.from_numpy(drawn.copy()))
        found.append(small[small != IGNORE])
    sizes = torch.bincount(torch.cat(found), minlength=sum(counts)).split(counts)
    assert all(size.max() - size.min() <= 1 for size in sizes)
    # The baseline is scored in its phase, the main branch in the other one; each is what its checkpoints predict with.
    assert [line["step"] for line in scalars(run.folder, "val")] == [4, 8]
    lines = scalars(run.folder)
    assert [("x_sub" in line, "u" in line) for line in lines] == [(False, False)] * 4 + [(True, True)] * 4
    model, _, _ = load_model(run.folder / "last.pt")
    assert_same(model.state_dict(), run.method.model.state_dict())


@pytest.mark.parametrize(
    "die_at", [("features", 3), ("balanced_kmeans", 1), ("write", 2)], ids=lambda pair: f"{pair[0]}-{pair[1]}"
)
def test_killed_between_the_phases(sample, whole, tmp_path, die_at):
    """Nothing is lost or done twice. The run ends with the same bits as one that was not killed."""
    config, done = small_config(sample, tmp_path / "run", *RUN), {}
    for kill in (die_at, None):
        AcceleratorState._reset_state(reset_partial_state=True)
        with pytest.MonkeyPatch.context() as patch:
            calls = counted(patch, die_at=kill)
            run = Trainer(config, resume=kill is None)
            if kill is None:
                assert (run.step, run.phase) == (4, 0)
                run.run()
            else:
                with pytest.raises(KeyboardInterrupt):
                    run.run()
        done = {name: done.get(name, 0) + calls[name] for name in WORK}
    assert done == whole[1]
    assert_same_ends(tmp_path / "run", whole[0].folder)


def test_killed_in_the_second_phase(sample, whole, tmp_path, monkeypatch):
    config = small_config(sample, tmp_path / "run", *RUN)
    die_in_step(Trainer(config), 8, monkeypatch)
    calls = counted(monkeypatch)
    run = Trainer(config, resume=True)
    assert (run.step, run.phase, run.method.counts) == (6, 1, whole[0].method.counts)
    run.run()
    assert not any(calls.values())
    assert_same_ends(tmp_path / "run", whole[0].folder)


def assert_same_ends(folder, expected):
    ends = [checkpoint.load(path / "last.pt") for path in (folder, expected)]
    for content in ends:
        content.pop("config")
    assert_same(*ends)
    for path in sorted((expected / "subclasses").iterdir()):
        assert (folder / "subclasses" / path.name).read_bytes() == path.read_bytes()
    assert scalars(folder) == scalars(expected)


def test_gradients_in_the_second_phase(whole):
    run, _ = whole
    method = run.method.train()
    method.zero_grad()
    loss, values = method(next(run_batches(run)), progress(phase=1))
    loss.backward()
    assert all(value.isfinite() and not value.requires_grad for value in values.values())
    missing = [name for name, p in method.named_parameters() if p.grad is None]
    assert missing == [name for name, _ in method.named_parameters() if name.startswith("baseline.")]
    assert all(not p.requires_grad for p in method.baseline.parameters())
    groups = {p for group in method.parameter_groups(run.config.train) for p in group["params"]}
    assert groups == {*method.model.parameters(), *method.branch.parameters()}
    method.zero_grad()


def run_batches(run):
    run.step = 4
    loader = run.loader()
    run.step = 8
    return loader


@pytest.mark.parametrize("harm", ["lost", "image", "class", "counts", "network", "size", "file"])
def test_maps_that_do_not_fit_are_refused(sample, whole, harm, tmp_path):
    run, _ = whole
    for path in (run.folder / "subclasses").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    maps = run.method.streams()["labeled"].maps["subclass"]
    assert use(maps, run.data.labeled, run.data.classes).shape == (120, 160)
    items, classes, facts = list(run.data.labeled), list(run.data.classes), dict(maps.facts)
    message = {
        "lost": "are lost", "image": "of other images than", "class": "of other classes than",
        "counts": "of other counts than", "network": "of other baseline than",
        "size": r"000002\.png: the map is of \(8, 8\), ",
        "file": r"1 of 5 maps are missing, 000002\.png the first",
    }[harm]  # fmt: skip
    if harm == "lost":
        (tmp_path / "maps.json").unlink()
    elif harm == "image":
        items.reverse()
    elif harm == "class":
        classes.reverse()
    elif harm == "counts":
        facts["counts"] = [*facts["counts"][:-1], 9]
    elif harm == "network":
        facts["baseline"] = fingerprint(run.method.model)
    elif harm == "size":
        Image.new("L", (8, 8)).save(tmp_path / "000002.png")
    else:
        (tmp_path / "000002.png").unlink()
    broken = stage.Maps(tmp_path, facts)
    with pytest.raises(DataError, match=message):
        use(broken, items, classes)


def use(maps, items, classes):
    maps.check(items, classes)
    return maps.read(2, (120, 160))


def test_too_few_positions_for_a_class(sample, tmp_path):
    config = small_config(sample, tmp_path / "run", *RUN, "subclass.counts=[1,1,1,1,1,200]", "train.epoch_steps=1")
    with pytest.raises(DataError, match=r"subclass\.counts: pond has \d+ positions, too few for 200 subclasses"):
        Trainer(config).run()


def test_the_average_follows_the_network_of_the_phase(sample, tmp_path):
    run = Trainer(small_config(sample, tmp_path / "run", *RUN, "train.ema=0.5", "train.epoch_steps=1"))
    run.run()
    assert list(run.method.scored) == ["average", "model"]
    own, averaged = run.method.model.state_dict(), run.method.average.network.state_dict()
    far = [name for name, x in averaged.items() if "running" not in name and (x.float() - own[name]).abs().max() > 0.1]
    assert not far  # after one step it is as near as that step is long


@pytest.mark.parametrize("form", ["plain", "regions"])
def test_propagation_in_the_second_phase(sample, tmp_path, form):
    on = ("propagation.head=true", f"propagation.regions={form == 'regions'}")
    run = Trainer(small_config(sample, tmp_path / "run", *RUN, *on, "train.epoch_steps=2"))
    run.run()
    line = scalars(tmp_path / "run")[-1]
    assert {"x_corr", "u_corr"} < line.keys()
    assert line["x_corr"] > 0


def divide_alone(data, folder, network, process, processes):
    """The work between the phases. The networks of the processes have different weights."""
    config = small_config(data, folder, *RUN)
    method = build_method(config, 6)
    if process == 0:
        method.baseline.load_state_dict(torch.load(network))
    run = Run(find_data(config.data), config, Path(folder), torch.device("cpu"), process, processes)
    return stage.make_subclasses(method.baseline, run, None, most=12, sample=8)


def divide_together(data, folder, network):
    dist.init_process_group("gloo")
    (Path(folder) / "subclasses").mkdir(parents=True, exist_ok=True)
    divide_alone(data, folder, network, dist.get_rank(), 2)
    dist.destroy_process_group()


def test_two_processes_share_the_work(sample, tmp_path):
    network = tmp_path / "network.pt"
    torch.save(build_method(small_config(sample, tmp_path, *RUN), 6).baseline.state_dict(), network)
    call = f"divide_together({str(sample)!r}, {str(tmp_path / 'two')!r}, {str(network)!r})"
    in_two_processes(__file__, call, tmp_path)
    divide_alone(sample, tmp_path / "one", network, 0, 1)
    files = [sorted((tmp_path / name / "subclasses").iterdir()) for name in ("one", "two")]
    assert [path.name for path in files[0]] == [path.name for path in files[1]]
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(*files, strict=True))
