"""The quality of pseudo-labels: counts with known answers, masks that training never opens, the log and the page."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState
from browser import Page
from PIL import Image
from torch import nn
from training import scalars, shorten, small_config

from corrmatch import cli
from corrmatch.config import Config, ConfigError, PropagationConfig
from corrmatch.data.datasets import Data, DataError, Item, find_data
from corrmatch.data.sample import draw_sample
from corrmatch.masks import RegionMasks
from corrmatch.methods import METHODS, build_method
from corrmatch.methods.parts.propagation import Propagation
from corrmatch.models.network import Prediction
from corrmatch.training import diagnostics
from corrmatch.training.compare import read_rows
from corrmatch.training.diagnostics import Labels
from corrmatch.training.pseudo_labels import reading
from corrmatch.training.trainer import Trainer

pytestmark = pytest.mark.slow

SOME = 7  # labelled images of the drawn sample that are listed as unlabelled here


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    """The last labelled images are listed as unlabelled, between two images without a mask."""
    folder = tmp_path_factory.mktemp("sample")
    draw_sample(folder)
    shorten(folder, labeled=12 - SOME, val=3)
    names = ["unlabeled_000", *(f"labeled_{i:03}" for i in range(12 - SOME, 12)), "unlabeled_001"]
    (folder / "splits" / "unlabeled.txt").write_text("\n".join(names) + "\n")
    return folder


@pytest.fixture(autouse=True)
def fresh_process():
    torch.use_deterministic_algorithms(False)
    AcceleratorState._reset_state(reset_partial_state=True)


def grid(*rows):
    return torch.tensor([rows])


def sums_of(classes, *parts):
    sums = {name: torch.zeros(size, dtype=torch.float64) for name, size in diagnostics._sizes(classes).items()}
    diagnostics._add(sums, *parts)
    return sums


def test_labels_against_a_count_by_hand():
    truth = grid([0, 0, 1, 1], [1, 1, 0, 255])
    before = Labels(grid([0, 0, 1, 0], [1, 0, 0, 0]), grid([1, 1, 1, 1], [0, 0, 1, 1]).bool())
    after = Labels(grid([0, 0, 1, 1], [1, 1, 1, 1]), grid([1, 1, 1, 1], [1, 0, 1, 1]).bool())
    sums = sums_of(2, diagnostics.label_sums(before, after, truth, 2))
    sums["area"][1] = 1  # there were regions
    found = diagnostics.rates(sums, ["a", "b"])
    expected = {
        "coverage": 5 / 7, "precision": 4 / 5,
        "coverage_a": 1, "recall_a": 1, "precision_a": 3 / 4,
        "coverage_b": 2 / 4, "recall_b": 1 / 4, "precision_b": 1,
        "after_coverage": 6 / 7, "after_precision": 5 / 6,
        "after_coverage_a": 1, "after_recall_a": 2 / 3, "after_precision_a": 1,
        "after_coverage_b": 3 / 4, "after_recall_b": 3 / 4, "after_precision_b": 3 / 4,
        "added": 1 / 7, "added_precision": 1, "added_precision_own": 1,
        "changed": 2 / 7, "changed_precision": 1 / 2, "changed_precision_own": 1 / 2,
    }  # fmt: skip
    assert {name: found[name] for name in expected} == pytest.approx(expected)


def test_what_there_is_nothing_of_has_no_share():
    none = Labels(grid([0, 0]), grid([False, False]))
    found = diagnostics.rates(sums_of(2, diagnostics.label_sums(none, none, grid([0, 0]), 2)), ["a", "b"])
    assert found["coverage"] == found["recall_a"] == 0
    assert all(math.isnan(found[name]) for name in ("precision", "precision_a", "coverage_b"))
    assert not any(name.startswith(("after", "added", "purity", "support")) for name in found)


def test_region_masks_against_a_count_by_hand():
    truth = grid([0, 0, 1, 255], [1, 1, 1, 0])
    masks = torch.zeros(1, 4, 2, 4, dtype=torch.bool)
    masks[0, 0, 0] = True  # two of three known pixels are of one class
    masks[0, 1, 0, 3] = True  # no known pixel
    masks[0, 2, 1, :3] = True  # pure
    found = diagnostics.region_sums(RegionMasks.from_bool(masks), truth, 2)
    assert found["purity"].tolist() == pytest.approx([2 / 3 + 1, 2])
    assert found["area"].tolist() == pytest.approx([4 / 8 + 1 / 8 + 3 / 8 + 0, 4])


@pytest.mark.parametrize(("strength", "support"), [(0.0, 12.0), (1e4, 1.0)], ids=["uniform", "one position"])
def test_effective_support(strength, support):
    maps = strength * torch.eye(12).view(1, 12, 3, 4)
    found = diagnostics.row_sums(maps, maps, 5, torch.Generator().manual_seed(0))["support"]
    assert found.tolist() == pytest.approx([5 * support, 5 * support / 12, 5])


def test_effective_support_between_the_ends():
    """Two positions of probability p each, all others of q."""
    query, key = torch.ones(1, 1, 2, 3), torch.zeros(1, 1, 2, 3)
    key[0, 0, 0, :2] = 2.0
    p, q = (math.exp(x) / (2 * math.exp(2) + 4) for x in (2, 0))
    entropy = -2 * p * math.log(p) - 4 * q * math.log(q)
    found = diagnostics.row_sums(query, key, 3, torch.Generator().manual_seed(0))["support"]
    assert found.tolist() == pytest.approx([3 * math.exp(entropy), 3 * math.exp(entropy) / 6, 3])


class Brightness(nn.Module):
    """Three classes by brightness."""

    def forward(self, images, correlate, features):
        bright = images.mean(1)
        return Prediction(torch.stack([-bright - 1, torch.zeros_like(bright), bright - 1], 1))


@pytest.fixture
def shades(tmp_path):
    """Images smaller and larger than the crop. Brightness labels all their rows but one right."""
    items, known, wrong = [], 0, 0
    for i, (height, width) in enumerate([(9, 9), (7, 12), (5, 6)]):
        shade = torch.randint(3, (height, width))
        mask = shade.clone()
        mask[height // 2] = (mask[height // 2] + 1) % 3
        mask[height // 2 - 1] = 255
        paths = [tmp_path / f"{i}.{kind}.png" for kind in ("image", "mask")]
        image = (125 * shade).to(torch.uint8).unsqueeze(-1).expand(-1, -1, 3)
        for path, x in zip(paths, (image, mask.to(torch.uint8)), strict=True):
            Image.fromarray(x.contiguous().numpy()).save(path)
        items.append(Item(str(i), *paths))
        columns = min(width, 9)
        known, wrong = known + columns * (height - 1), wrong + columns
    return Data([], [], [], ["dark", "middle", "light"], torch.arange(256).to(torch.uint8)), items, known, wrong


def test_images_are_cut_and_their_padding_does_not_count(shades):
    data, items, known, wrong = shades
    config = Config()
    config.train.crop, config.train.workers = 9, 0
    method = SimpleNamespace(
        labeller=Brightness(),
        threshold=0.0,
        propagation=Propagation(PropagationConfig(head=False)),
    )
    device = torch.device("cpu")
    sums = diagnostics.count(method, items, data, config, device)
    assert sums["truth"].sum() == sums["before"].sum() == known
    assert sums["before"].trace() == known - wrong
    shares = [diagnostics.count(method, items, data, config, device, process, 4) for process in range(4)]
    assert all(torch.equal(sum(share[name] for share in shares), sums[name]) for name in sums)
    method.threshold = 1.1
    assert diagnostics.count(method, items, data, config, device)["before"].sum() == 0


OWN_THRESHOLDS = ("fixmatch.class_share=0.5", "unimatch.class_share=0.5", "corrmatch.class_share=0.5")


@pytest.mark.parametrize("head", [False, True], ids=["plain", "head"])
@pytest.mark.parametrize(
    ("name", "more"),
    [(name, ()) for name in METHODS] + [(key.partition(".")[0], (key,)) for key in OWN_THRESHOLDS],
    ids=[*METHODS, *OWN_THRESHOLDS],
)
def test_every_method_is_measured(sample, tmp_path, name, more, head):
    """Also with a threshold for each class, where regions have their own. Without it they are not measured."""
    keys = (f"method={name}", f"propagation.head={head}", "propagation.regions=false", *more)
    if more or name == "self_training":
        plain = build_method(small_config(sample, tmp_path, *keys), 6)
        assert not plain.propagation.fits(plain.threshold)
        data = find_data(small_config(sample, tmp_path).data)
        items, device = diagnostics.choose(data)[:1], torch.device("cpu")
        sums = diagnostics.count(plain, items, data, small_config(sample, tmp_path, *keys), device)
        assert "after_coverage" not in diagnostics.rates(sums, data.classes)
        keys = (*keys, "propagation.region_threshold=0.5")
    config = small_config(sample, tmp_path, *keys)
    data = find_data(config.data)
    method, state = build_method(config, len(data.classes)), torch.get_rng_state()
    sums = diagnostics.count(method, diagnostics.choose(data)[:2], data, config, torch.device("cpu"))
    assert torch.equal(torch.get_rng_state(), state)
    assert method.training
    found = diagnostics.rates(sums, data.classes)
    assert 0 <= found["coverage"] <= 1
    assert ("after_coverage" in found) == head
    if head:
        assert found["after_coverage"] == pytest.approx(found["coverage"] + found["added"])
        assert 1 <= found["support"] <= 16
        assert 0 < found["area"] < 1
        assert 1 / len(data.classes) <= found["purity"] <= 1


def test_masks_of_unlabelled_images_are_found_and_set_apart(sample, tmp_path):
    data = find_data(small_config(sample, tmp_path).data)
    assert [item.mask for item in data.unlabeled] == [None] * (SOME + 2)
    assert [item.name for item in data.withheld] == [f"labeled_{i:03}" for i in range(12 - SOME, 12)]
    pairs = [
        f"JPEGImages/{name}.jpg\tSegmentationClass/{name}.png" for name in ("labeled_000", "labeled_009", "val_000")
    ]
    pairs.append("JPEGImages/unlabeled_000.jpg\tSegmentationClass/unlabeled_000.png")  # a mask that is not there
    (sample / "splits" / "pairs.txt").write_text("\n".join(pairs))
    data = find_data(small_config(sample, tmp_path, "data.unlabeled=splits/pairs.txt").data)
    assert len(data.unlabeled) == 4
    (item,) = data.withheld  # labeled_000 is trained on with its mask, val_000 is for validation
    assert item.mask == sample / "SegmentationClass/labeled_009.png"
    every = find_data(small_config(sample, tmp_path, "data.unlabeled=null").data)
    assert {"labeled_005", "val_003"} <= {item.name for item in every.withheld}
    assert not {"labeled_000", "val_000", "unlabeled_000"} & {item.name for item in every.withheld}


def test_images_are_chosen_evenly(monkeypatch):
    monkeypatch.setattr(diagnostics, "IMAGES", 4)
    data = Data([], [], [], [], torch.empty(0), withheld=tuple(range(10)))
    assert diagnostics.choose(data) == [0, 2, 5, 7]
    assert diagnostics.choose(Data([], [], [], [], torch.empty(0), withheld=(1, 2))) == [1, 2]


def test_training_is_the_same_and_opens_no_such_mask(sample, tmp_path, monkeypatch):
    opened, whole = [], diagnostics.Labelled.__getitem__
    monkeypatch.setattr(
        diagnostics.Labelled, "__getitem__", lambda self, i: opened.append(self.items[i].name) or whole(self, i)
    )
    for name, wanted in (("off", False), ("on", True)):
        opened.clear()
        AcceleratorState._reset_state(reset_partial_state=True)
        Trainer(small_config(sample, tmp_path / name, f"eval.pseudo_labels={wanted}", "data.check=false")).run()
        assert any(name.startswith("labeled") for name in opened) == wanted
    for kind in ("train", "val"):
        assert scalars(tmp_path / "off", kind) == scalars(tmp_path / "on", kind)
    assert not scalars(tmp_path / "off", "pseudo")
    (line,) = scalars(tmp_path / "on", "pseudo")
    assert line["step"] == scalars(tmp_path / "on", "val")[-1]["step"]
    (row,) = read_rows([tmp_path / "on", tmp_path / "off"])
    assert len(row.runs) == 2  # to have measured makes no other setting


def test_the_page_shows_them(sample, tmp_path):
    runs = [tmp_path / f"{seed}" for seed in range(2)]
    for seed, folder in enumerate(runs):
        AcceleratorState._reset_state(reset_partial_state=True)
        Trainer(small_config(sample, folder, "eval.pseudo_labels=true", f"train.seed={seed}")).run()
    out = tmp_path / "page.html"
    assert cli.main(["compare", *map(str, runs), "--out", str(out)]) == 0
    tables = Page(out.read_text(encoding="utf-8")).tables
    a, b = (scalars(folder, "pseudo")[-1] for folder in runs)

    def mean(name):
        known = [line[name] for line in (a, b) if not math.isnan(line[name])]
        return f"{100 * sum(known) / len(known):.2f}" if known else "n/a"

    summary = dict(next(t for t in tables if t[1][0] == "coverage")[1:])
    assert summary["coverage"].split()[0] == mean("coverage")
    assert summary["changed: right"].split()[0] == mean("changed_precision")
    assert summary["effective support of a correlation row"].split()[0] == mean("support_share")
    by_class = {line[0]: line[1:] for line in next(t for t in tables if t[0][0] == "class")[1:]}
    kinds = ("coverage", "recall", "precision", "after_coverage", "after_recall", "after_precision")
    assert [cell.split()[0] for cell in by_class["pond"]] == [mean(f"{kind}_pond") for kind in kinds]


def test_the_page_says_what_the_numbers_mean():
    line = {
        "coverage": 0.8, "precision": 0.9, "recall_sky": 0.7, "recall_<pole>": 0.02,
        "added": 0.06, "added_precision": 0.5, "added_precision_own": 0.7,
        "changed": 0.02, "changed_precision": 0.1, "changed_precision_own": 0.5,
    }  # fmt: skip

    def row(**changes):
        lines = {"pseudo": [line | changes], "val": [{"iou_sky": 0.5, "iou_<pole>": 0.0}]}
        runs = [SimpleNamespace(lines=lines)]
        return SimpleNamespace(
            runs=runs,
            names=lambda kind: lines[kind][0],
            last=lambda name, kind: SimpleNamespace(mean=lines[kind][0][name]),
        )

    said = list(reading(row()))
    assert said[0] == "Reliable labels cover 80.00 % of the pixels; 90.00 % of them are right."
    assert said[1].endswith("hardly taught: &lt;pole&gt; (2.00 %).")
    assert "labels of 8.00 % of the pixels. 40.00 % of these are right; as labelled before, 65.00 % were." in said[2]
    assert "It harms" in said[2]
    assert "It helps" in list(reading(row(added_precision=0.9)))[2]
    none = row(added=0.0, changed=0.0, added_precision=math.nan, changed_precision=math.nan)
    assert list(reading(none))[2] == "Region propagation gives no pixel another label."


def test_what_cannot_be_measured_is_refused_before_the_first_step(sample, tmp_path):
    (sample / "splits" / "bare.txt").write_text("unlabeled_000\nunlabeled_001\n")
    wanted = "eval.pseudo_labels=true"
    with pytest.raises(ConfigError, match=r"eval\.pseudo_labels: expected masks of unlabelled images"):
        Trainer(small_config(sample, tmp_path / "a", wanted, "data.unlabeled=splits/bare.txt"))
    Image.new("L", (160, 120), 77).save(sample / "SegmentationClass" / "unlabeled_001.png")
    config = small_config(sample, tmp_path / "b", wanted, "data.unlabeled=splits/bare.txt")
    with pytest.raises(DataError, match=r"unlabeled_001\.png: ids \[77\]"):
        Trainer(config)
    (sample / "SegmentationClass" / "unlabeled_001.png").unlink()
