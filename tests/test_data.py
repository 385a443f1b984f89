"""Data sets as configurations describe them, views, streams and the drawn sample."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from PIL import Image

from corrmatch.config import DataConfig, TrainConfig, load_config
from corrmatch.data.datasets import IGNORE, DataError, check_files, find_data, read_mask
from corrmatch.data.sample import CLASSES, IMAGES, draw_sample
from corrmatch.data.streams import LABELED, MIX, UNLABELED, Stream, Streams, batches
from corrmatch.data.views import View


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sample")
    draw_sample(folder)
    return folder


def sample_data(folder, **changes):
    config = load_config("sample", [f"data.root={folder}"]).data
    for key, value in changes.items():
        setattr(config, key, value)
    return find_data(config)


@pytest.fixture
def folder(tmp_path):
    """Twelve images of mixed kinds, masks for ten of them, a class list."""
    for name in ("images", "masks"):
        (tmp_path / name).mkdir()
    for i in range(12):
        Image.new("RGB", (20, 15), (20 * i, 0, 0)).save(tmp_path / "images" / f"p{i:02}.{('jpg', 'png')[i % 2]}")
        if i < 10:
            write_mask(tmp_path / "masks" / f"p{i:02}.png", i % 2)
    (tmp_path / "classes.txt").write_text("ground\nthing\n")
    return tmp_path


def write_mask(path, ids, size=(20, 15)):
    Image.fromarray(np.full(size[::-1], ids, np.uint8)).save(path)


def names(items):
    return [item.name for item in items]


def test_a_folder_needs_no_lists(folder):
    data = find_data(DataConfig(root=str(folder)))
    assert data.classes == ["ground", "thing"]
    assert names(data.val) == ["p04", "p09"]
    assert names(data.labeled) == ["p00", "p01", "p02", "p03", "p05", "p06", "p07", "p08"]
    assert names(data.unlabeled) == ["p10", "p11"]
    assert [item.mask for item in data.unlabeled] == [None, None]
    check_files(data)


def test_the_drawn_sample(sample):
    data = sample_data(sample)
    check_files(data)
    assert [len(data.labeled), len(data.unlabeled), len(data.val)] == list(IMAGES.values())
    assert data.classes == list(CLASSES)
    masks = torch.stack([read_mask(item.mask, data.table) for item in data.labeled])
    share = torch.bincount(masks.flatten().long(), minlength=256) / masks.numel()
    assert share[: len(CLASSES)].min() > 0.02
    assert 0 < share[IGNORE] < 0.1


@pytest.mark.slow
def test_the_drawn_sample_follows_its_seed(tmp_path):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        draw_sample(tmp_path / name, seed)
    first, again, other = ((tmp_path / name / "JPEGImages" / "val_003.jpg").read_bytes() for name in "abc")
    assert first == again
    assert first != other


def test_lists_of_pairs_and_relabelling(folder):
    """Lists in the form of CamVid's, and class ids in the form of Cityscapes'."""
    write_mask(folder / "masks" / "p00.png", 7)
    write_mask(folder / "masks" / "p01.png", 4)
    (folder / "train.txt").write_text("images/p00.jpg masks/p00.png\nimages/p01.png masks/p01.png\n")
    (folder / "rest.txt").write_text("images/p02.jpg masks/no_such_file.png\n\np11\n")
    (folder / "val.txt").write_text("p03\n")
    write_mask(folder / "masks" / "p03.png", 11)
    config = DataConfig(
        root=str(folder), labeled="train.txt", unlabeled="rest.txt", val="val.txt", ids=[11, 7], ignore=[4],
        classes=["a", "b"],
    )  # fmt: skip
    data = find_data(config)
    check_files(data)
    assert read_mask(data.labeled[0].mask, data.table).unique().tolist() == [1]
    assert read_mask(data.labeled[1].mask, data.table).unique().tolist() == [IGNORE]
    assert [item.image.name for item in data.unlabeled] == ["p02.jpg", "p11.png"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "list.txt").write_text("p00\np77\np78\n"), r"data.labeled: .*image of p77, .*mask of p78"),
        (lambda f: (f / "list.txt").write_text("\n"), "data.labeled: .*is empty"),
        (lambda f: (f / "list.txt").write_text("p00 p01 p02\n"), "data.labeled: .*expected an id"),
        (lambda f: (f / "list.txt").write_text("images/p00.jpg\n"), "data.labeled: .*p00.jpg is an image without its"),
        (
            lambda f: (f / "list.txt").write_text("p00\nimages/../images/p00.jpg masks/p00.png\n"),
            "more than once: .*p00",
        ),
        (lambda f: (f / "list.txt").write_bytes(b"p00\xff\n"), r"data.labeled: .*list\.txt: expected text in UTF-8"),
        (lambda f: (f / "list.txt").write_text(f"{'x' * 5000}\n"), "data.labeled: .*not found"),
        (lambda f: None, "data.labeled: there is no list"),
    ],
    ids=["unknown ids", "empty", "three fields", "no mask", "twice", "encoding", "long", "no list"],
)
def test_bad_lists_are_named(folder, damage, message):
    damage(folder)
    with pytest.raises(DataError, match=message):
        find_data(DataConfig(root=str(folder), labeled="list.txt"))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "images/p10.jpg").write_bytes(b"not an image"), r"p10\.jpg: not a readable image"),
        (lambda f: truncate(f / "images/p00.jpg"), r"p00\.jpg: not a readable image"),
        (lambda f: write_mask(f / "masks/p03.png", 9), r"p03\.png: ids \[9\] are neither classes nor"),
        (lambda f: write_mask(f / "masks/p03.png", 0, (21, 15)), r"p03\.png: the mask is of \(15, 21\), its image"),
        (lambda f: write_mask(f / "masks/p03.png", 0, (15, 20)), r"p03\.png: the mask is of .*EXIF orientation"),
        (lambda f: Image.new("RGB", (20, 15)).save(f / "masks/p03.png"), r"p03\.png: expected 8-bit class ids"),
    ],
    ids=["not an image", "truncated", "id out of range", "size", "on its side", "colour mask"],
)
def test_bad_files_are_named(folder, damage, message):
    damage(folder)
    data = find_data(DataConfig(root=str(folder)))
    with pytest.raises(DataError, match="1 of 12 images cannot be used") as caught:
        check_files(data)
    assert caught.match(message)


def truncate(path):
    Image.effect_noise((64, 64), 80).convert("RGB").save(path)
    path.write_bytes(path.read_bytes()[:600])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"root": "nowhere"}, "data.root: nowhere is not a folder"),
        ({"classes": "none.txt"}, "data.classes: expected a list"),
        ({"classes": ["one"]}, "data.classes: expected 2 to"),
        ({"ids": [1]}, "data.ids: expected an id for each of the 2"),
        ({"ignore": [256]}, "expected 0 to 255, got 256"),
        ({"ids": [1, 1]}, "data.ids: more than once: 1"),
        ({"ids": [0, 255]}, "data.ids, data.ignore: 255 is the id of a class and ignored"),
        ({"classes": ["a", "b", " a "]}, "data.classes: more than once: a"),
        ({"classes": ["yes", False]}, "data.classes: expected names, got False; put such a name in quotes"),
        ({"classes": ["a", None]}, "data.classes: expected names, got None"),
        ({"classes": ["a", 1.5]}, "data.classes: expected names, got 1.5"),
        ({"images": "images"}, "data.images: expected a pattern"),
        ({"masks": "{}/{}.png"}, "data.masks: expected a pattern with one {}"),
        (
            {"masks": "masks/{}.tif"},
            r"no image with a mask in .*; 12 files match images/{}\.\*; 0 files match masks/{}\.tif",
        ),
        ({"val_every": 11}, "data.val: 10 images have a mask, too few to hold out every 11th; set data.val_every"),
    ],
)
def test_bad_settings_are_explained(folder, changes, message):
    with pytest.raises(DataError, match=message):
        find_data(DataConfig(**({"root": str(folder)} | changes)))


def test_validation_images_are_not_trained_on(folder):
    everything = "".join(f"p{i:02}\n" for i in range(10))
    (folder / "all.txt").write_text(everything)
    (folder / "some.txt").write_text("p03\nimages/p08.jpg masks/p08.png\n")
    held_out = find_data(DataConfig(root=str(folder), labeled="all.txt", unlabeled="all.txt"))
    assert names(held_out.val) == ["p04", "p09"]
    for items in (held_out.labeled, held_out.unlabeled):
        assert names(items) == [f"p{i:02}" for i in range(10) if i not in (4, 9)]
    listed = find_data(DataConfig(root=str(folder), val="some.txt"))
    assert not {"p03", "p08"} & {*names(listed.labeled), *names(listed.unlabeled)}
    with pytest.raises(DataError, match=r"data\.labeled, data\.val: images in both lists: p03, p08"):
        find_data(DataConfig(root=str(folder), labeled="all.txt", val="some.txt"))
    with pytest.raises(DataError, match=r"data\.labeled: every image with a mask is in data\.val"):
        find_data(DataConfig(root=str(folder), val="all.txt"))
    noted = find_data(DataConfig(root=str(folder), unlabeled="all.txt", val="some.txt"))
    assert noted.notes == ("data.unlabeled: 2 images are in data.val as well: p03, p08",)
    assert len(noted.unlabeled) == 10


def test_a_image_is_not_its_own_mask(folder):
    """A file that matches both patterns is not its own mask, and a mask is not an image."""
    for i in range(10):
        write_mask(folder / "images" / f"p{i:02}_mask.png", i % 2)
    mixed = find_data(DataConfig(root=str(folder), masks="images/{}_mask.png"))
    assert len(mixed.labeled) + len(mixed.val) == 10
    assert names(mixed.unlabeled) == ["p10", "p11"]
    (folder / "link.png").symlink_to(folder / "masks" / "p00.png")
    for line in ("masks/p00.png masks/p00.png", "masks/p00.png masks/../masks/p00.png", "link.png masks/p00.png"):
        (folder / "list.txt").write_text(f"p01\n{line}\n")
        with pytest.raises(DataError, match=r"images are their own masks: (masks/p00|link)\.png"):
            find_data(DataConfig(root=str(folder), labeled="list.txt"))


def test_files_passed_over_are_counted(folder):
    for name in (".DS_Store", "Thumbs.db", "._p00.jpg", "notes.txt", "video.mpg"):
        (folder / "images" / name).write_bytes(b"\0\5\26\7")
    (folder / "masks" / "._p00.png").write_bytes(b"\0\5\26\7")
    data = find_data(DataConfig(root=str(folder)))
    check_files(data)
    assert [len(data.labeled), len(data.val), len(data.unlabeled)] == [8, 2, 2]
    assert data.notes == (
        "data.images: 5 files are no images, passed over: .DS_Store, ._p00.jpg, Thumbs.db, notes.txt, video.mpg",
        "data.masks: 1 files are no images, passed over: ._p00.png",
    )


def test_home_is_expanded(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder.parent))
    (folder / "list.txt").write_text(f"~/{folder.name}/images/p00.jpg ~/{folder.name}/masks/p00.png\np01\n")
    at = f"~/{folder.name}"
    data = find_data(
        DataConfig(
            root=at, labeled=f"{at}/list.txt", val_every=2, classes=f"{at}/classes.txt", masks=f"{at}/masks/{{}}.png"
        )
    )
    check_files(data)
    assert [item.image.name for item in (*data.labeled, *data.val)] == ["p00.jpg", "p01.png"]
    with pytest.raises(DataError, match=f"data.root: {folder.parent}/none is not a folder"):
        find_data(DataConfig(root="~/none"))


def test_pixels_of_each_id_are_counted(folder):
    write_mask(folder / "masks" / "p00.png", 255)
    pixels = check_files(find_data(DataConfig(root=str(folder))))
    assert {i: int(n) for i, n in enumerate(pixels["labeled"]) if n} == {0: 900, 1: 1200, 255: 300}
    assert {i: int(n) for i, n in enumerate(pixels["val"]) if n} == {0: 300, 1: 300}


def test_two_images_of_one_name(folder):
    Image.new("RGB", (20, 15)).save(folder / "images" / "p00.png")
    with pytest.raises(DataError, match=r"both p00\.jpg and p00\.png"):
        find_data(DataConfig(root=str(folder)))


def equal(a, b):
    return all(torch.equal(a[s][k], b[s][k]) for s in a for k in a[s])


def test_streams_are_functions_of_seed_and_position(sample):
    data, all_streams = sample_data(sample), {"labeled": LABELED, "unlabeled": UNLABELED, "mix": MIX}

    def streams(seed=1, **changes):
        return Streams(data, all_streams, TrainConfig(crop=49, seed=seed, **changes))

    expected = [{name: streams().sample(name, p) for name in all_streams} for p in range(4, 12)]
    random.seed(99)
    torch.manual_seed(99)
    again, other = ({name: streams(seed).sample(name, 7) for name in all_streams} for seed in (1, 2))
    assert equal(again, expected[3])
    assert not equal(other, expected[3])
    assert not torch.equal(expected[0]["unlabeled"]["weak"], expected[0]["mix"]["weak"])
    # However positions are dealt out to workers and processes, position p is the same sample.
    for workers, processes in ((0, 1), (2, 2)):
        train = TrainConfig(crop=49, seed=1, batch_size=4 // processes, workers=workers)
        parts = [Streams(data, all_streams, train, process, processes) for process in range(processes)]
        loaders = [batches(part, train, 1, 3) for part in parts]
        for b, parts in enumerate(zip(*loaders, strict=True)):
            got = torch.cat([part["unlabeled"]["strong"] for part in parts])
            assert torch.equal(got, torch.stack([x["unlabeled"]["strong"] for x in expected[4 * b : 4 * b + 4]]))


def test_steps_on_labels_alone_read_labelled_images_alone(sample):
    """Two steps of three batches each. The batches after them equal those of a run without such steps."""
    data, all_streams = sample_data(sample), {"labeled": LABELED, "unlabeled": UNLABELED, "mix": MIX}
    first, plain = (
        Streams(data, all_streams, TrainConfig(crop=49, batch_size=2, accumulate=3, labels_first=n)) for n in (2, 0)
    )
    for number in (0, 5):
        assert equal(first[number], {"labeled": plain[number]["labeled"]})
        assert [*first[number]] == ["labeled"]
    assert equal(first[6], plain[6])
    assert [*first[6]] == [*all_streams]


def test_a_pass_shows_every_image_once(sample, monkeypatch):
    data = sample_data(sample)
    count = len(data.labeled)
    drawn = []
    monkeypatch.setattr("corrmatch.data.streams.read_image", lambda path: drawn.append(path) or torch.zeros(3, 9, 9))
    monkeypatch.setattr("corrmatch.data.streams.labeled_view", lambda *_: {})
    streams = Streams(data, {"labeled": LABELED}, TrainConfig(crop=49, seed=1))
    for position in range(2 * count):
        _ = streams.sample("labeled", position)
    passes = drawn[:count], drawn[count:]
    assert [set(p) for p in passes] == 2 * [{item.image for item in data.labeled}]
    assert passes[0] != passes[1]


def test_streams_of_unequal_batches_and_of_all_images(sample):
    data = sample_data(sample)
    streams = {"labeled": LABELED, "all": Stream("all", View(), 1)}
    train = TrainConfig(crop=49, batch_size=2, unlabeled_batch_size=3, workers=0)
    batch = Streams(data, streams, train)[0]
    assert batch["labeled"]["image"].shape[0] == 2
    assert batch["all"]["weak"].shape[0] == 3
    assert "label" not in batch["all"]
    seen = {int(Streams(data, streams, train).sample("all", p)["index"]) for p in range(96)}
    assert seen == set(range(len(data.labeled) + len(data.unlabeled)))
