"""Messages about the labelled pixels of each class."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from corrmatch.config import DataConfig
from corrmatch.data import classes
from corrmatch.data.datasets import DataError, check_files, find_data


def counted(folder, masks, **changes):
    """The data set of these masks (16 x 10), every fourth for validation, and its pixels."""
    for name in ("images", "masks"):
        (folder / name).mkdir()
    for i, ids in enumerate(masks):
        Image.new("RGB", (16, 10)).save(folder / "images" / f"{i}.jpg")
        Image.fromarray(np.resize(np.array(ids, np.uint8), (10, 16))).save(folder / "masks" / f"{i}.png")
    data = find_data(DataConfig(**({"root": str(folder), "classes": ["ground", "thing"], "val_every": 4} | changes)))
    return data, check_files(data)


def test_the_table(tmp_path):
    data, pixels = counted(tmp_path, [[0], [0, 1], [0, 0, 1, 255], [1]])
    classes.require_labels(data, pixels)
    classes.require_truth(data, pixels)
    assert classes.table(data, pixels).splitlines() == [
        "pixels       labelled   share    validation",
        "ground            320   66.7%             0",
        "thing             120   25.0%           160",
        "ignored            40    8.3%             0",
    ]


def test_ids_are_counted_as_the_classes_they_stand_for(tmp_path):
    masks = [[7], [7, 9], [3, 9, 255, 255], [9]]
    data, pixels = counted(tmp_path, masks, ids=[9, 7], ignore=[3, 255])
    rows = [line.split() for line in classes.table(data, pixels).splitlines()[1:]]
    assert rows == [["ground", "120", "25.0%", "160"], ["thing", "240", "50.0%", "0"], ["ignored", "120", "25.0%", "0"]]


def test_masks_of_0_and_255_are_explained(tmp_path):
    data, pixels = counted(tmp_path, 4 * [[0, 255]])
    with pytest.raises(DataError) as caught:
        classes.require_labels(data, pixels)
    assert str(caught.value) == (
        "data.labeled: no pixel of thing: the masks hold the ids 0 (50%), 255 (50%, ignored); where 255 is a class, "
        "as in black and white masks, set data.ids=[0,255] data.ignore=[]; data.allow_absent=true trains nevertheless"
    )
    data = find_data(DataConfig(root=str(tmp_path), classes=["ground", "thing"], val_every=4, ids=[0, 255], ignore=[]))
    pixels = check_files(data)
    classes.require_labels(data, pixels)
    assert classes.table(data, pixels).splitlines()[2].split() == ["thing", "240", "50.0%", "80"]


def test_absent_classes_are_named(tmp_path):
    names = ["a", "b", "c", "d", "e", "f", "g"]
    data, pixels = counted(tmp_path, [[1], [1, 255], [1], [0, 1, 2, 3]], classes=names)
    with pytest.raises(
        DataError, match=r"no pixel of a, c, d, e, f, and 1 more: the masks hold the ids 1 \(83%\), 255"
    ):
        classes.require_labels(data, pixels)
    classes.require_truth(data, pixels)


def test_a_large_ignored_share_is_warned_of(tmp_path):
    data, pixels = counted(tmp_path, [[0, 1, 255], [255], [255], [255]])
    assert classes.table(data, pixels).splitlines()[-1] == (
        "warning: 78% of the labelled pixels are ignored (data.ignore)"
    )
    with pytest.raises(
        DataError, match=r"data\.val: no pixel of any class: the masks hold the ids 255 \(100%, ignored\)"
    ):
        classes.require_truth(data, pixels)
