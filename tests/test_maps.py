"""Maps that a run computes: their content, their images, and batches with them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from corrmatch.config import TrainConfig
from corrmatch.data.datasets import IGNORE, Data, DataError, Item
from corrmatch.data.maps import SHARES, Maps, atomically
from corrmatch.data.streams import UNLABELED, Stream, Streams, part_of
from corrmatch.data.views import Geometry, View

CLASSES = ["a", "b", "c"]


@pytest.fixture
def items(tmp_path):
    found = []
    for i in range(4):
        path = tmp_path / f"{i}.png"
        labels = np.random.default_rng(i).integers(0, 3, (40, 56), dtype=np.uint8)
        Image.fromarray(labels * 80).convert("RGB").save(path)
        found.append(Item(str(i), path, None))
    return found


def written(folder, items, **changes):
    """Labels that are the image's own colours, and shares that follow from them."""
    maps, shares = Maps(folder, **changes), Maps(folder, kind=SHARES, **changes)
    maps.claim(items, CLASSES)
    for i, item in enumerate(items):
        labels = np.asarray(Image.open(item.image))[..., 0] // 80
        shares.write(i, labels / 4 + 0.125)
        maps.write(i, labels)
    return maps, shares


def test_what_is_read_is_what_was_written(tmp_path):
    maps, shares = Maps(tmp_path), Maps(tmp_path, kind=SHARES)
    labels, confidence = np.random.randint(256, size=(33, 47), dtype=np.uint8), np.random.rand(33, 47)  # noqa: NPY002
    confidence[0, :2] = 0, 1
    maps.write(3, labels)
    shares.write(3, confidence.astype(np.float32))
    assert np.array_equal(maps.read(3, (33, 47)).numpy(), labels)
    found = shares.read(3, (33, 47))
    assert found.dtype == torch.float32
    assert np.abs(found.numpy() - confidence).max() < 0.5 / 65_535 + 1e-7
    assert found[0, :2].tolist() == [0, 1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["000003.png", "000003.share.png"]
    with pytest.raises(DataError, match=r"000003\.png: the map is of \(33, 47\), its image of \(33, 48\)"):
        maps.read(3, (33, 48))


def test_maps_that_fit_are_kept_and_others_removed(tmp_path, items):
    maps, shares = written(tmp_path / "maps", items, facts={"network": "x"})
    for kept in (maps, shares):
        kept.check(items, CLASSES)
    maps.claim(items, CLASSES)
    assert all(path.exists() for path in maps.paths(items))
    others = (
        (Maps(maps.folder, {"network": "y"}), items, CLASSES, "network"),
        (maps, items, ["a", "c", "b"], "classes"),
        (maps, items[1:], CLASSES, "images"),
    )
    for other, images, classes, wrong in others:
        with pytest.raises(DataError, match=f"maps of other {wrong} than this run has"):
            other.check(images, classes)
    others[0][0].claim(items, CLASSES)
    assert [path.name for path in maps.folder.iterdir()] == ["maps.json"]


def test_lost_maps_are_named(tmp_path, items):
    maps, shares = written(tmp_path / "maps", items)
    shares.path(2).unlink()
    maps.check(items, CLASSES)
    with pytest.raises(DataError, match=r"1 of 4 maps are missing, 000002\.share\.png the first"):
        shares.check(items, CLASSES)
    (maps.folder / "maps.json").write_text("{")
    with pytest.raises(DataError, match="are lost"):
        maps.check(items, CLASSES)
    shares.path(0).write_bytes(b"no image")
    with pytest.raises(DataError, match="not a readable map"):
        shares.read(0, (40, 56))


def test_a_file_is_whole_or_not_there(tmp_path):
    def fail(draft):
        draft.write_text("half")
        raise KeyboardInterrupt

    path = tmp_path / "file"
    path.write_text("before")
    with pytest.raises(KeyboardInterrupt):
        atomically(path, fail)
    assert path.read_text() == "before"


def test_maps_follow_the_image(tmp_path, items):
    """The map stays aligned with the image through crop, flip and padding."""
    maps, shares = Maps(tmp_path / "m"), Maps(tmp_path / "m", kind=SHARES)
    maps.claim(items, CLASSES)
    labels = np.zeros((40, 56), np.uint8)
    labels[:, 28:] = 2
    for i, item in enumerate(items):
        Image.fromarray(100 * labels).convert("RGB").save(item.image)
        shares.write(i, labels / 4)
        maps.write(i, labels)
    data = Data([], items, [], CLASSES, torch.arange(256, dtype=torch.uint8))
    view = View(Geometry(scales=(1.0, 1.0)))
    stream = Stream("unlabeled", view, 1, {"pseudo": maps, "sure": shares}, size=3)
    streams = Streams(data, {"unlabeled": stream}, TrainConfig(crop=49, workers=0))
    for number in range(4):
        batch = streams[number]["unlabeled"]
        assert batch["pseudo"].shape == batch["sure"].shape == (3, 49, 49)
        assert batch["pseudo"].dtype == torch.int64
        assert torch.equal(batch["pseudo"] == IGNORE, batch["ignore"])
        counted = ~batch["ignore"]
        assert torch.equal(batch["sure"][counted].mul(4).round().long(), batch["pseudo"][counted])
        bright = batch["weak"][:, 0] > 0
        assert torch.equal(bright[counted], (batch["pseudo"] == 2)[counted])


def test_a_stream_refuses_maps_of_other_data(tmp_path, items):
    maps, _ = written(tmp_path / "maps", items)
    data = Data([], items, [], ["other", "b", "c"], torch.arange(256, dtype=torch.uint8))
    with pytest.raises(DataError, match="maps of other classes"):
        Streams(data, {"unlabeled": Stream(maps={"pseudo": maps})}, TrainConfig(crop=49))


def test_parts_of_a_list():
    """Parts of one shuffled list may overlap. A part has at least one image."""
    first, last = (part_of(100, 7, part) for part in ((0, 0.8), (0.2, 1)))
    assert len(first) == len(last) == 80
    assert len(set(first) & set(last)) == 60
    assert set(first) | set(last) == set(range(100))
    assert list(first) != list(range(80))
    assert part_of(100, 8, (0, 0.8)) != first
    assert list(part_of(5, 0, (0, 1))) == [0, 1, 2, 3, 4]
    assert [len(part_of(1, 0, part)) for part in ((0, 0.2), (0.8, 1.0))] == [1, 1]


def test_streams_of_a_part(items):
    data = Data([], items, [], CLASSES, torch.arange(256, dtype=torch.uint8))
    view = View(Geometry())
    streams = {"first": Stream("unlabeled", view, part=(0, 0.5)), "all": UNLABELED}
    batches = Streams(data, streams, TrainConfig(crop=49, batch_size=4))
    seen = {name: {i for number in range(4) for i in batches[number][name]["index"].tolist()} for name in streams}
    assert seen["first"] == set(part_of(4, 0, (0, 0.5)))
    assert len(seen["first"]) == 2
    assert seen["all"] == {0, 1, 2, 3}
