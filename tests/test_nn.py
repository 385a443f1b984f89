"""The correlation head and the dynamic threshold."""

from __future__ import annotations

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from child import run_python

import corrmatch
from corrmatch import nn, ops


@pytest.fixture
def head():
    return nn.CorrelationHead(12, 5, hidden_channels=16)


def test_head_without_masks(head):
    feature, logits = torch.randn(2, 12, 6, 7), torch.randn(2, 5, 31, 37)
    out = head(feature, logits)
    assert out.propagated.shape == (2, 5, 6, 7)
    assert out.masks is None
    head.eval()
    hidden = head.project(feature)
    value = F.interpolate(logits, size=(6, 7), mode="bilinear", align_corners=True)
    expected = ops.pixel_propagate(head.query(hidden), head.key(hidden), value)
    torch.testing.assert_close(head(feature, logits).propagated, expected)


def test_head_gradients(head):
    feature = torch.randn(2, 12, 6, 7, requires_grad=True)
    logits = torch.randn(2, 5, 31, 37, requires_grad=True)
    head(feature, logits).propagated.square().sum().backward()
    assert logits.grad is None
    assert feature.grad.abs().sum() > 0
    for name, parameter in head.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        if name != "key.bias":  # a shift of all keys by the same vector changes nothing
            assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("size", [None, (9, 8)])
@pytest.mark.parametrize("connected", [None, "peak"])
def test_head_with_masks(head, size, connected):
    feature, logits = torch.randn(2, 12, 6, 7), torch.randn(2, 5, 31, 37)
    head.eval()
    generator = torch.Generator().manual_seed(3)
    masks = head(feature, logits, num_masks=9, mask_size=size, connected=connected, generator=generator).masks
    assert masks.size == (size or (31, 37))
    index = torch.randint(42, (9,), generator=torch.Generator().manual_seed(3))
    hidden = head.project(feature)
    expected = ops.region_masks(head.query(hidden), head.key(hidden), index, masks.size, connected=connected)
    assert torch.equal(masks.packed, expected.packed)


def test_head_samples_every_position(head, monkeypatch):
    """The last position is sampled too."""
    drawn = []
    original = ops.region_masks

    def watched(query, key, index, *arguments, **options):
        drawn.append(index)
        return original(query, key, index, *arguments, **options)

    monkeypatch.setattr(corrmatch.nn.ops, "region_masks", watched)
    for _ in range(4):
        head(torch.randn(1, 12, 2, 3), torch.randn(1, 5, 4, 6), num_masks=100)
    counts = torch.bincount(torch.cat(drawn), minlength=6)
    assert counts.shape == (6,)
    assert (counts > 20).all()  # 400 draws of 6: fewer than 21 of one has a probability below 1e-9
    assert len({tuple(index.tolist()) for index in drawn}) == 4


@pytest.mark.slow
def test_head_moves_and_compiles(head):
    feature, logits = torch.randn(2, 12, 6, 7), torch.randn(2, 5, 31, 37)
    double = copy.deepcopy(head).double().eval()
    z = double(feature.double(), logits.double()).propagated
    assert z.dtype == torch.float64
    head.eval()
    torch.testing.assert_close(head(feature, logits).propagated, z.float(), rtol=1e-4, atol=1e-5)
    compiled = torch.compile(head, fullgraph=True, dynamic=True, backend="aot_eager")
    torch.testing.assert_close(compiled(feature, logits).propagated, head(feature, logits).propagated)


def test_head_pickles(head):
    head.eval()
    feature, logits = torch.randn(2, 12, 6, 7), torch.randn(2, 5, 31, 37)
    expected = head(feature, logits).propagated
    for copied in (pickle.loads(pickle.dumps(head)), copy.deepcopy(head)):
        assert torch.equal(copied(feature, logits).propagated, expected)


class Segmenter(torch.nn.Module):
    """A small model with a correlation head."""

    def __init__(self, num_masks):
        super().__init__()
        self.backbone = torch.nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.classify = torch.nn.Conv2d(8, 4, 1)
        self.head = nn.CorrelationHead(8, 4, hidden_channels=16)
        self.num_masks = num_masks

    def forward(self, image):
        feature = self.backbone(image)
        logits = self.classify(feature)
        size = image.shape[2:]
        out = self.head(feature, logits, num_masks=self.num_masks, mask_size=size)
        large = F.interpolate(out.propagated, size=size, mode="bilinear", align_corners=True)
        return large if out.masks is None else (large, out.masks.packed)


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("num_masks", [0, 5])
def test_export_of_the_head(head, num_masks, dynamic, tmp_path):
    """With all its results, through a file."""
    sizes = dict.fromkeys((0, 2, 3), torch.export.Dim.AUTO) if dynamic else None
    arguments = (torch.randn(2, 12, 6, 7), torch.randn(2, 5, 31, 37))
    options = {"num_masks": num_masks}
    shapes = {"feature": sizes, "logits": sizes, "num_masks": None}
    program = torch.export.export(head.eval(), arguments, options, dynamic_shapes=shapes)
    torch.export.save(program, tmp_path / "head.pt2")
    loaded = torch.export.load(tmp_path / "head.pt2").module()
    if dynamic:
        arguments = (torch.randn(3, 12, 5, 9), torch.randn(3, 5, 21, 19))
    found = loaded(*arguments, **options)
    assert isinstance(found, nn.CorrelationOutput)
    torch.testing.assert_close(found.propagated, head(*arguments).propagated)
    assert found.masks is None if num_masks == 0 else found.masks.size == tuple(arguments[1].shape[2:])


@pytest.mark.slow
@pytest.mark.parametrize("num_masks", [0, 5])
def test_export_of_a_model_with_the_head(num_masks, tmp_path):
    """With dynamic batch and size, through a file."""
    model = Segmenter(num_masks).eval()
    dynamic = {0: torch.export.Dim.AUTO, 2: torch.export.Dim.AUTO, 3: torch.export.Dim.AUTO}
    exported = torch.export.export(model, (torch.randn(2, 3, 20, 24),), dynamic_shapes=(dynamic,))
    torch.export.save(exported, tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2").module()
    for shape in ((2, 3, 20, 24), (3, 3, 28, 17)):
        image = torch.randn(shape)
        torch.manual_seed(0)
        found = loaded(image)
        torch.manual_seed(0)
        expected = model(image)
        for a, b in zip(found, expected, strict=True):
            assert torch.equal(a, b)


def test_threshold_formula():
    theta = nn.DynamicThreshold(0.6, momentum=0.9)
    theta.update(torch.tensor([0.5, 0.0, 1.0]))
    assert theta.threshold.item() == pytest.approx(0.9 * 0.6 + 0.1 * 0.75, abs=1e-7)
    theta.update(torch.tensor([0.0, 0.4, 0.0]))
    assert theta.threshold.item() == pytest.approx(0.9 * 0.615 + 0.1 * 0.4, abs=1e-7)


def test_threshold_defaults():
    theta = nn.DynamicThreshold()
    assert theta.threshold.dim() == 0
    assert theta.threshold.dtype == torch.float32
    assert theta.threshold.item() == pytest.approx(0.85)
    assert theta.momentum == 0.999


def test_threshold_stays_without_a_present_class():
    theta = nn.DynamicThreshold(0.6)
    before = theta.threshold.clone()
    assert torch.equal(theta.update(torch.zeros(7)), before)


def test_threshold_keeps_its_buffer():
    """An update is in place, so tensors that were passed to ops change."""
    theta = nn.DynamicThreshold(0.6, momentum=0.5)
    given = theta.threshold
    returned = theta.update(torch.ones(3))
    assert given is theta.threshold
    assert returned is given
    assert given.item() == pytest.approx(0.8)


def test_threshold_forward():
    theta = nn.DynamicThreshold(0.6)
    logits, ignore = torch.randn(2, 4, 5, 6, requires_grad=True), torch.rand(2, 9, 11) < 0.3
    expected = ops.pseudo_label(logits.detach(), size=(9, 11), ignore=ignore)
    theta.eval()
    labels, confidence, threshold = theta(logits, size=(9, 11), ignore=ignore)
    assert torch.equal(labels, expected[0])
    assert torch.equal(confidence, expected[1])
    assert threshold.item() == pytest.approx(0.6)
    theta.train()
    *_, threshold = theta(logits, size=(9, 11), ignore=ignore)
    peak = expected[2]
    assert threshold.item() == pytest.approx(0.999 * 0.6 + 0.001 * peak[peak > 0].mean().item(), abs=1e-6)
    assert not confidence.requires_grad


CASTS = {
    "half": lambda module: module.half(),
    "bfloat16": lambda module: module.bfloat16(),
    "double": lambda module: module.double(),
    "to": lambda module: module.to(torch.bfloat16),
    "to the device": lambda module: module.to("cpu", torch.float16),
    "within a model": lambda module: torch.nn.Sequential(torch.nn.Linear(2, 2), module).bfloat16()[1],
    "there and back": lambda module: module.half().float(),
    "a copy": lambda module: copy.deepcopy(module).half(),
}


@pytest.mark.parametrize("cast", CASTS)
def test_a_cast_leaves_the_threshold_alone(cast):
    """In bfloat16 the threshold would not change with a momentum of 0.999."""
    theta = nn.DynamicThreshold(0.85, 0.999)
    for _ in range(3):
        theta.update(torch.tensor([0.99, 0.97, 0.0]))
    before = theta.threshold.clone()
    theta = CASTS[cast](theta)
    assert theta.threshold.dtype == torch.float32
    assert torch.equal(theta.threshold, before)
    assert [name for name, _ in theta.named_buffers()] == ["threshold"]
    moved = theta.update(torch.tensor([0.99, 0.97, 0.0]))
    assert moved.item() == pytest.approx(0.999 * before.item() + 0.001 * 0.98, abs=1e-7)


def test_a_cast_in_place_moves_what_was_given():
    theta = nn.DynamicThreshold(0.85)
    given = theta.threshold
    theta.half().update(torch.ones(2))
    assert given is theta.threshold


def test_a_cast_and_a_move_at_once():
    assert nn.DynamicThreshold().to("meta", torch.float16).threshold.device.type == "meta"
    filled = nn.DynamicThreshold().to("meta").half().to_empty(device="cpu")
    filled.load_state_dict(nn.DynamicThreshold(0.6).state_dict())
    assert filled.threshold.item() == pytest.approx(0.6)


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_threshold_of_a_checkpoint_in_another_precision(dtype, assign):
    theta = torch.nn.ModuleDict({"theta": nn.DynamicThreshold(0.85)})
    theta.load_state_dict({"theta.threshold": torch.tensor(0.5, dtype=dtype)}, assign=assign)
    assert theta["theta"].threshold.dtype == torch.float32
    assert theta["theta"].threshold.item() == 0.5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_peaks_of_another_precision(dtype):
    """The mean is computed in float32. A sum of a thousand peaks in float16 would be wrong."""
    peaks = torch.full((1000,), 0.75, dtype=dtype)
    assert nn.DynamicThreshold(0.0, 0.5).update(peaks).item() == pytest.approx(0.375, abs=1e-7)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_peak_that_is_no_number_counts_as_absent(bad):
    theta, peaks = nn.DynamicThreshold(0.6, momentum=0.9), torch.tensor([bad, 0.8, 0.0, 0.4])
    assert theta.update(peaks).item() == pytest.approx(0.9 * 0.6 + 0.1 * 0.6, abs=1e-6)
    before = theta.threshold.clone()
    assert torch.equal(theta.update(torch.tensor([bad, bad, 0.0])), before)
    assert peaks[0].isnan() or peaks[0] == bad, "the argument stays"


def test_a_batch_of_nan_leaves_the_threshold():
    """NaN logits do not change the threshold. The next batch does."""
    theta, logits = nn.DynamicThreshold(0.6, momentum=0.5), torch.full((1, 3, 4, 5), float("nan"))
    assert theta(logits)[2].item() == pytest.approx(0.6)
    assert theta(torch.tensor([9.0, 0.0, 0.0]).view(1, 3, 1, 1).expand(1, 3, 4, 5))[2].item() > 0.79


def test_threshold_state_and_pickle():
    theta = nn.DynamicThreshold(0.6, momentum=0.9)
    theta.update(torch.tensor([1.0]))
    assert list(theta.state_dict()) == ["threshold"]
    fresh = nn.DynamicThreshold()
    fresh.load_state_dict(theta.state_dict())
    assert torch.equal(fresh.threshold, theta.threshold)
    for copied in (pickle.loads(pickle.dumps(theta)), copy.deepcopy(theta)):
        assert torch.equal(copied.update(torch.tensor([0.2])), copy.deepcopy(theta).update(torch.tensor([0.2])))


WORKER = """
import sys
import torch
import torch.distributed as dist
from corrmatch.nn import DynamicThreshold

rank, store = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
theta = DynamicThreshold(0.6, momentum=0.9)
peaks = torch.tensor([[0.5, 0.0, 0.9, 0.0], [0.7, 0.3, 0.0, 0.0]])
mine = peaks[rank].clone()
theta.update(mine)
assert torch.equal(mine, peaks[rank]), "the argument stays"
bad = torch.tensor([float("nan"), 0.0, float("inf"), 0.0])
theta.update(bad if rank == 0 else torch.tensor([0.0, 0.0, 0.0, 0.4]))
print(repr(theta.threshold.item()))
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_threshold_of_two_processes(tmp_path):
    """Both processes have the threshold of the maxima over both."""
    with ThreadPoolExecutor(2) as pool:
        outputs = pool.map(lambda rank: run_python(WORKER, rank, str(tmp_path / "store")), ("0", "1"))
    results = [float(output) for output in outputs]
    first = 0.9 * 0.6 + 0.1 * (0.7 + 0.3 + 0.9) / 3
    assert results == pytest.approx([0.9 * first + 0.1 * 0.4] * 2, abs=1e-6)
    assert results[0] == results[1]
