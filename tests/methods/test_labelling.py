"""Work on images between two phases: interrupted, resumed, shared by processes."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from child import in_two_processes
from torch import nn
from tqdm import tqdm
from training import small_config

from corrmatch.data.datasets import find_data
from corrmatch.data.maps import Maps
from corrmatch.data.views import seeded
from corrmatch.methods.base import Run
from corrmatch.methods.parts import labelling
from corrmatch.methods.parts.labelling import alike, claim, fingerprint, over_images, wait_for


def run_of(sample, folder, process=0, processes=1, **changes):
    config = small_config(sample, folder)
    for key, value in changes.items():
        setattr(config.train, key, value)
    return Run(find_data(config.data), config, folder, torch.device("cpu"), process, processes)


def label(run, maps, die_at=None):
    """Labels each unlabelled image with its brightness. Returns the numbers of the images that were labelled now."""
    items, seen = run.data.unlabeled, []

    def work(i, image):
        if i == die_at:
            raise KeyboardInterrupt
        seen.append(i)
        maps.write(i, (image[0] > image[0].mean()).byte().numpy())

    claim([maps], items, run)
    try:
        over_images(items, maps.paths(items), work, run, "labels")
    except KeyboardInterrupt:
        assert die_at is not None
    return seen


@pytest.mark.parametrize("workers", [0, 2])
def test_what_is_done_is_not_done_again(small_sample, tmp_path, workers, monkeypatch):
    bars = []
    monkeypatch.setattr(labelling, "tqdm", lambda **options: bars.append(options) or tqdm(**options))
    run = run_of(small_sample, tmp_path, workers=workers)
    count = len(run.data.unlabeled)
    maps = Maps(tmp_path / "halves", {"network": "x"})
    first = label(run, maps, die_at=5)
    assert first == [0, 1, 2, 3, 4]
    assert label(run, maps) == list(range(5, count))
    assert label(run, maps) == []
    assert [(bar["total"], bar["initial"]) for bar in bars] == [(8, 0), (8, 5), (8, 8)]
    maps.check(run.data.unlabeled, run.data.classes)
    whole = Maps(tmp_path / "whole", {"network": "x"})
    label(run, whole)
    for i, item in enumerate(run.data.unlabeled):
        size = (120, 160)
        assert torch.equal(maps.read(i, size), whole.read(i, size)), item.name
    assert not list(tmp_path.rglob("*.partial"))


def test_another_network_starts_anew(small_sample, tmp_path):
    run = run_of(small_sample, tmp_path)
    label(run, Maps(tmp_path / "maps", {"network": "x"}), die_at=3)
    assert len(label(run, Maps(tmp_path / "maps", {"network": "y"}))) == len(run.data.unlabeled)


def test_nothing_random_is_drawn(small_sample, tmp_path):
    """A resumed run continues as one that was not interrupted."""
    run = run_of(small_sample, tmp_path)
    with seeded(5):
        expected = torch.rand(3)
    with seeded(5):
        label(run, Maps(tmp_path / "maps"))
        assert torch.equal(torch.rand(3), expected)


def test_a_process_waits_for_the_files_of_others(tmp_path):
    files = [tmp_path / name for name in "ab"]
    files[0].touch()
    timer = threading.Timer(0.3, files[1].touch)
    timer.start()
    wait_for(files)
    assert all(file.exists() for file in files)
    timer.join()


def label_in_two(sample, folder):
    """Writes the images that each process has labelled to a file. The processes' networks have different statistics."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    network = nn.BatchNorm2d(3)
    network.running_mean += rank
    alike(network)
    assert network.running_mean.tolist() == [0, 0, 0]
    run = run_of(sample, folder, rank, 2)
    maps = Maps(folder / "maps", {"network": fingerprint(network)})
    seen = label(run, maps)
    maps.check(run.data.unlabeled, run.data.classes)  # those of the other process too
    (folder / f"seen{rank}").write_text(repr(seen))
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_processes_share_the_images(small_sample, tmp_path):
    in_two_processes(__file__, f"label_in_two({str(small_sample)!r}, Path({str(tmp_path)!r}))", tmp_path)
    seen = [eval((tmp_path / f"seen{rank}").read_text()) for rank in (0, 1)]
    assert seen == [[0, 2, 4, 6], [1, 3, 5, 7]]
    one = Maps(tmp_path / "one")
    label(run_of(small_sample, tmp_path), one)
    for path in (tmp_path / "maps").glob("*.png"):
        assert path.read_bytes() == (Path(one.folder) / path.name).read_bytes()


def test_a_fingerprint_is_that_of_the_weights():
    first, second = (nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)) for _ in range(2))
    assert fingerprint(first) != fingerprint(second)
    second.load_state_dict(first.state_dict())
    assert fingerprint(first) == fingerprint(second)
    second[1].running_var += 1e-6
    assert fingerprint(first) != fingerprint(second)
    assert labelling.fingerprint(first, second) != fingerprint(second, first)
