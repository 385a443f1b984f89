"""Sums over the processes of a run: two processes with half of the pixels each equal one with all pixels."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from child import in_two_processes

from corrmatch.methods.mutual_distillation import ClassVariances
from corrmatch.methods.parts.processes import total
from corrmatch.methods.prcl import Pixels, prototype_sums, prototypes

pytestmark = pytest.mark.slow


def pixels():
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(4, (4, 5, 6), generator=generator)
    labels[:2][labels[:2] == 3] = 255  # a class that one process has not
    return torch.randn(4, 3, 5, 6, generator=generator), labels


def classes(features, labels):
    """PRCL's prototypes."""
    rows = features.movedim(1, -1).flatten(0, 2)
    pixels = Pixels(rows, rows.sigmoid(), labels.flatten(), labels.flatten())
    means = prototypes(total(prototype_sums(pixels, 4)))
    return {"mu": means.mu, "variance": means.variance}


def updated(features, labels):
    """The statistics after two updates."""
    statistics = ClassVariances(4, 3)
    for part in (slice(None, None, 2), slice(1, None, 2)):
        statistics.update(features[part], labels[part])
    return statistics.state_dict()


def half(folder):
    """The work of one of two processes."""
    dist.init_process_group("gloo")
    mine = slice(2 * dist.get_rank(), 2 * dist.get_rank() + 2)
    before = torch.arange(3.0) + dist.get_rank()
    after = total(before)
    assert torch.equal(before, torch.arange(3.0) + dist.get_rank())
    states = updated(*(x[mine] for x in pixels())) | classes(*(x[mine] for x in pixels())) | {"sum": after}
    torch.save(states, Path(folder) / f"{dist.get_rank()}.pt")
    dist.destroy_process_group()


def test_sums_statistics_and_prototypes_agree(tmp_path):
    in_two_processes(__file__, f"half({str(tmp_path)!r})", tmp_path)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    features, labels = pixels()
    expected = updated(features, labels) | classes(features, labels) | {"sum": torch.tensor([1.0, 3.0, 5.0])}
    for name, value in expected.items():
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], value)


def test_one_process_has_its_own_sums():
    sums = torch.randn(3)
    assert torch.equal(total(sums), sums)
