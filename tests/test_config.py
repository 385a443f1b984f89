"""Configurations: files, overrides, and messages about mistakes."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import ClassVar

import pytest
from omegaconf import OmegaConf

from corrmatch.config import (
    Config,
    ConfigError,
    DataConfig,
    EvalConfig,
    ModelConfig,
    PropagationConfig,
    TrainConfig,
    key,
    keys,
    load_config,
    parse,
    to_yaml,
)
from corrmatch.methods import METHODS
from corrmatch.training import checkpoint

CONFIGS = sorted(path.stem for path in (Path(__file__).parents[1] / "configs").glob("*.yaml"))


@pytest.mark.parametrize("name", CONFIGS)
def test_shipped_configurations_by_name_and_by_path(name):
    path = Path(__file__).parents[1] / "configs" / f"{name}.yaml"
    config = load_config(name, ["data.root=somewhere"])
    assert config == load_config(str(path), ["data.root=somewhere"])
    assert config.method in name or config.method == ("unimatch_v2" if "dinov2" in name else "corrmatch")


def test_there_are_the_promised_ones():
    assert {"pascal_321", "pascal_513", "cityscapes", "camvid", "sample", "folder"} <= set(CONFIGS)
    named = {load_config(name, ["data.root=x"]).method for name in CONFIGS}
    assert set(METHODS) - {"supervised"} <= named


def test_recipes():
    pascal, cityscapes = (load_config(name, ["data.root=x"]) for name in ("pascal_513", "cityscapes"))
    train = pascal.train
    assert (train.crop, train.epochs, train.batch_size, train.lr, train.lr_multi) == (513, 80, 4, 0.001, 10)
    assert (train.momentum, train.weight_decay, train.power, train.ohem) == (0.9, 1e-4, 0.9, False)
    assert (pascal.corrmatch.threshold, pascal.corrmatch.momentum, pascal.eval.mode) == (0.85, 0.999, "original")
    assert (len(pascal.data.classes), len(cityscapes.data.classes), len(cityscapes.data.ids)) == (21, 19, 19)
    train = cityscapes.train
    assert (train.crop, train.epochs, train.batch_size, train.lr, train.lr_multi) == (801, 240, 2, 0.005, 1)
    assert (train.ohem, cityscapes.corrmatch.threshold, cityscapes.corrmatch.momentum) == (True, 0, 1)
    assert (cityscapes.eval.mode, cityscapes.eval.window, cityscapes.eval.stride) == ("sliding", 801, 534)
    for config in (pascal, cityscapes):
        assert (config.model.backbone, config.model.output_stride) == ("resnet101s", 8)
        assert config.model.atrous_rates == [12, 24, 36]


def test_recipes_of_unimatch_v2():
    """Crop, epochs, images of a process and classes. Other keys are the same."""
    published = {
        "pascal_518_dinov2": (518, 60, 4, 21),
        "cityscapes_798_dinov2": (798, 180, 2, 19),
        "ade20k_518_dinov2": (518, 60, 2, 150),
        "coco_518_dinov2": (518, 20, 4, 81),
    }
    for name, expected in published.items():
        config = load_config(name, ["data.root=x"])
        train, model, city = config.train, config.model, "cityscapes" in name
        assert (train.crop, train.epochs, train.batch_size, len(config.data.classes)) == expected
        assert (train.optimizer, train.lr, train.lr_multi, train.weight_decay) == ("adamw", 5e-6, 40, 0.01)
        assert (train.decay_norms, train.schedule, train.power, train.warmup) == (True, "poly", 0.9, 0)
        assert (train.epoch, train.precision, train.ohem) == ("unlabeled", "no", city)
        assert (model.backbone, model.decoder, model.channels) == ("vit_base_patch14_dinov2", "dpt", None)
        assert (config.options.threshold, config.options.decay) == (0.95, 0.996)
        assert config.eval.mode == ("sliding" if city else "original")
        if city:
            assert (config.eval.window, config.eval.stride, train.ohem_pixels) == (798, 532, 200_000)
    data = load_config("ade20k_518_dinov2", ["data.root=x"]).data
    assert data.ids == list(range(1, 151))
    assert 0 in data.ignore


def test_overrides_and_round_trip(tmp_path):
    config = load_config("sample", ["data.root=x", "train.ema=0.99", "data.val=null", "model.pretrained=a.pth"])
    assert (config.train.ema, config.data.val, config.model.pretrained) == (0.99, None, "a.pth")
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    again = load_config(str(tmp_path / "config.yaml"))
    assert to_yaml(again) == to_yaml(config)
    assert again.options == config.options
    assert isinstance(config, Config)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.rot=x", "data.rot: no such key; did you mean data.root?"),
        ("epochs=3", "epochs: no such key; did you mean train.epochs?"),
        ("trian.epochs=3", "trian.epochs: no such key; did you mean train.epochs?"),
        ("quite_unlike=3", "quite_unlike: no such key"),
        ("train=3", "train: expected a section"),
        ("train.epochs=many", "train.epochs: Value 'many'"),
        ("train.epochs=0", "train.epochs: expected at least 1, got 0"),
        ("train.batch_size=1", "train.batch_size: expected at least 2"),
        ("train.lr=-1", "train.lr: expected at least 0, got -1"),
        ("train.lr=nan", "train.lr: expected at least 0, got nan"),
        ("train.ema=2", "train.ema: expected 0 to 1, got 2"),
        ("method=corrmach", "method: expected one of supervised, corrmatch,"),
        ("train.crop", "train.crop: expected key=value"),
        ("train.lr=inf", "train.lr: expected at least 0, got inf"),
        ("train.weight_decay=nan", "train.weight_decay: expected at least 0, got nan"),
        ("train.seed=-1", "train.seed: expected 0 to 2147483647, got -1"),
        ("train.seed=4294967296", "train.seed: expected 0 to 2147483647, got 4294967296"),
        ("train.epochs=@3", "train.epochs: Value '@3'"),
        ("data.root.x=3", "data.root.x: root has a value already"),
        ("data.ids=[0,256]", "data.ids: expected 0 to 255, got 256"),
    ],
)
def test_mistakes_are_explained(override, message):
    with pytest.raises(ConfigError) as caught:
        load_config("sample", ["data.root=x", override])
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    "text",
    ["2012_07", "@eaDir", "0x10", "1e3", "no", "null", "~", "a: b", "[1]", "{", "a=b", "#1", "- x", "'q'", "*"],
)
def test_text_on_the_command_line_is_taken_as_typed(text, tmp_path):
    arguments = [f"data.root={text}", f"work_dir={text}", f"data.images={text}", f"model.backbone={text}"]
    config = load_config("folder", [*arguments, f"data.val=x{text}"])
    assert [config.data.root, config.work_dir, config.data.images, config.model.backbone] == 4 * [text]
    assert config.data.val == f"x{text}"
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    again = load_config(str(tmp_path / "config.yaml"))
    assert to_yaml(again) == to_yaml(config)
    assert again.options == config.options


def test_other_values_on_the_command_line_are_yaml():
    arguments = [
        "data.root=x", "data.val=null", "data.ids=[3,4]", "data.ignore=[]", "data.check=no", "train.lr=1e-3",
        "train.ema=0.9", "train.precision=no", "data.classes=[a, 'no']", "model.pretrained=false", "train.epochs=1_0",
    ]  # fmt: skip
    config = load_config("folder", arguments)
    assert (config.data.val, config.data.ids, config.data.ignore, config.data.check) == (None, [3, 4], [], False)
    assert (config.train.lr, config.train.ema, config.train.precision, config.train.epochs) == (0.001, 0.9, "no", 10)
    assert (config.data.classes, config.model.pretrained) == (["a", "no"], False)
    # Keys of any kind are not of numbers: these are names of files.
    config = load_config("folder", ["data.root=x", "data.classes=2012_07", "model.pretrained=1e3"])
    assert (config.data.classes, config.model.pretrained) == ("2012_07", "1e3")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("data: {root: 2012_07}", "data.root: expected text, got 201207; put it in quotes"),
        ("work_dir: 1.50", "work_dir: expected text, got 1.5; put it in quotes"),
        ("data: {val: no}", "data.val: expected text, got False; put it in quotes"),
        ("propagation: {connected: 3}", "propagation.connected: expected text, got 3"),
    ],
)
def test_numbers_in_a_file_are_no_text(tmp_path, text, message):
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(ConfigError, match=f"^{message}"):
        load_config(str(tmp_path / "run.yaml"))


def test_windows_leave_no_gaps():
    sliding = ["data.root=x", "eval.mode=sliding", "eval.window=33"]
    with pytest.raises(ConfigError, match=r"eval\.stride: expected at most eval\.window \(33\), .*, got 34"):
        load_config("folder", [*sliding, "eval.stride=34"])
    assert load_config("folder", [*sliding, "eval.stride=33"]).eval.stride == 33
    assert load_config("folder", ["data.root=x", "eval.stride=900"]).eval.stride == 900  # not used


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_encodings_and_home(tmp_path, monkeypatch, encoding):
    (tmp_path / "run.yaml").write_bytes("data:\r\n  root: Straße\r\n".encode(encoding))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load_config("~/run.yaml").data.root == "Straße"


def test_a_file_that_is_no_text_is_named(tmp_path):
    for content in ("data: {root: Straße}".encode("latin-1"), "data: {root: x}".encode("utf-16-le"), b"\x00\xff"):
        (tmp_path / "run.yaml").write_bytes(content)
        with pytest.raises(ConfigError, match=r"run\.yaml: expected text in UTF-8"):
            load_config(str(tmp_path / "run.yaml"))


def test_a_missing_value_and_a_missing_file_are_named():
    with pytest.raises(ConfigError, match=r"data\.root: expected a value"):
        load_config("sample")
    with pytest.raises(
        ConfigError, match="fodler: no such file; shipped configurations are ade20k_518_dinov2, camvid, camvid_cpu"
    ):
        load_config("fodler")


@pytest.mark.parametrize(
    ("text", "message"),
    [("train: [", "not YAML: "), ("[1, 2]", "expected keys and values"), ("lr: 1", "lr: no such key")],
)
def test_what_is_no_configuration(tmp_path, text, message):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_config(str(path))


def test_a_folder_does_not_hide_a_shipped_configuration(tmp_path, monkeypatch):
    (tmp_path / "sample").mkdir()  # by `corrmatch sample sample`, say
    monkeypatch.chdir(tmp_path)
    assert load_config("sample", ["data.root=sample"]).data.root == "sample"


def test_every_key_is_known_once():
    known = keys(load_config("sample", ["data.root=x"]))
    assert len(known) == len(set(known))
    assert {"data.root", "train.lr", "method", "corrmatch.threshold", "fixmatch.decay", "eval.window"} <= set(known)
    assert set(checkpoint.FREE) <= set(known)


def test_every_key_says_what_it_is():
    shared = (DataConfig, ModelConfig, PropagationConfig, TrainConfig, EvalConfig)
    for section in (*shared, *(method.Options for method in METHODS.values())):
        for entry in fields(section):
            assert entry.metadata["about"], f"{section.__name__}.{entry.name}"


@dataclass
class Bounded:
    """Keys with each kind of limit."""

    share: float | None = key(0.5, "a share", low=0, high=1)
    sides: list[int] = key([4], "sides", low=2)
    word: str | None = key(None, "a word", choices=(None, "a", "b"))


class WithBounds:
    Options = Bounded
    renamed: ClassVar = {"bounded.fraction": "bounded.share"}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"share": 1.5}, "bounded.share: expected 0 to 1, got 1.5"),
        ({"share": float("nan")}, "bounded.share: expected 0 to 1, got nan"),
        ({"sides": [3, 1]}, "bounded.sides: expected at least 2, got 1"),
        ({"word": "c"}, "bounded.word: expected one of None, a, b, got c"),
        ({"sides": 3}, "bounded.sides: "),
    ],
)
def test_limits_stand_beside_the_key(values, message):
    part = OmegaConf.create({"data": {"root": "x"}, "method": "bounded", "bounded": values})
    with pytest.raises(ConfigError) as caught:
        parse([part], {"bounded": WithBounds})
    assert str(caught.value).startswith(message)


def test_old_names_are_understood():
    part = OmegaConf.create({"data": {"root": "x"}, "method": "bounded", "bounded": {"fraction": 0.25}})
    assert parse([part], {"bounded": WithBounds}).options == Bounded(share=0.25)
    old = load_config("sample", ["data.root=x", "corrmatch.num_masks=4", "corrmatch.connected=peak"])
    assert (old.propagation.num_masks, old.propagation.connected) == (4, "peak")
    old = load_config("folder", ["data.root=x", "data.pictures=photos/{}.*"])
    assert (old.data.images, old.data.masks) == ("photos/{}.*", "masks/{}.png")


def test_only_the_sections_that_are_used_are_written():
    text = to_yaml(load_config("sample", ["data.root=x", "method=fixmatch", "fixmatch.decay=0.5"]))
    assert "fixmatch:" in text
    assert "corrmatch:" not in text


def test_a_file_says_what_is_different_from_its_base(tmp_path):
    (tmp_path / "mine.yaml").write_text("base: sample\ntrain: {lr: 0.25}\n")
    (tmp_path / "more.yaml").write_text("base: mine.yaml\nmethod: unimatch\ntrain: {crop: 65}\n")
    config, sample = load_config(str(tmp_path / "more.yaml"), ["data.root=x"]), load_config("sample", ["data.root=x"])
    assert (config.method, config.train.lr, config.train.crop) == ("unimatch", 0.25, 65)
    assert config.train.epochs == sample.train.epochs
    assert config.data == sample.data
    for text, message in (("base: no_such", "no_such: no such file"), ("base: mine.yaml", "base: .* never ends")):
        (tmp_path / "mine.yaml").write_text(text)
        with pytest.raises(ConfigError, match=message):
            load_config(str(tmp_path / "more.yaml"))
