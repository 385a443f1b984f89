"""Patterns, lists and paths that users write."""

from __future__ import annotations

import os

import pytest
from PIL import Image

from corrmatch.data.files import read_list, scan, shorten
from corrmatch.data.images import DataError
from corrmatch.paths import expand, make_folder, read_text


@pytest.fixture
def root(tmp_path):
    return tmp_path / "my [old] data"


def draw(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (4, 3)).save(root / name)


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("masks/{}.png", {"a": "a.png", "sub/b": "sub/b.png", "mask_c": "mask_c.png", "sub/mask_d": "sub/mask_d.png"}),
        ("masks/mask_{}.png", {"c": "mask_c.png", "sub/d": "sub/mask_d.png"}),
        ("masks/sub/mask_{}.png", {"d": "sub/mask_d.png"}),
        ("./masks//mask_{}.*", {"c": "mask_c.png", "e": "mask_e.TIF", "sub/d": "sub/mask_d.png"}),
        ("masks/../masks/mask_{}.png", {"c": "mask_c.png", "sub/d": "sub/mask_d.png"}),
        ("masks/{}_e.*", {"mask": "mask_e.TIF"}),
        ("{root}/masks/mask_{}.png", {"c": "mask_c.png", "sub/d": "sub/mask_d.png"}),
        ("~/masks/mask_{}.png", {"c": "mask_c.png", "sub/d": "sub/mask_d.png"}),
        ("masks/{}/b.png", {"sub": "sub/b.png"}),
        ("mask[s]/{}.png", {}),
        ("nowhere/{}.png", {}),
        ("mas*/{}.png", {}),
    ],
)
def test_patterns(root, monkeypatch, pattern, expected):
    """All characters but {} and a last .* are literal, in the pattern and in the name of the folder."""
    monkeypatch.setenv("HOME", str(root))
    names = ("a.png", "sub/b.png", "mask_c.png", "sub/mask_d.png", "mask_e.TIF")
    draw(root, *(f"masks/{name}" for name in names))
    found = scan(root, "data.masks", pattern.replace("{root}", str(root))).files
    assert {name: os.path.relpath(path, root / "masks") for name, path in found.items()} == expected


def test_brackets_in_a_pattern(root):
    draw(root, "im[1]ages/p[0].jpg", "im1ages/p0.jpg")
    assert set(scan(root, "data.images", "im[1]ages/{}.*").files) == {"p[0]"}


def test_hidden_and_foreign_files_are_passed_over(root):
    draw(root, "images/a.jpg", "images/B.JPG", "images/@eaDir/a.jpg", "images/__MACOSX/c.jpg", "images/.trash/d.jpg")
    for name in (".DS_Store", "Thumbs.db", "desktop.ini", "._a.jpg", ".a.jpg", "a.txt", "scan.pdf", "cells.h5"):
        (root / "images" / name).write_bytes(b"\0")
    (root / "images" / "folder.jpg").mkdir()
    os.mkfifo(root / "images" / "pipe.png")  # reading it would wait for ever
    found = scan(root, "data.images", "images/{}.*")
    assert set(found.files) == {"a", "B"}
    assert len(found.passed) == 9
    assert found.note() == [
        "data.images: 9 files are no images, passed over: .DS_Store, ._a.jpg, .a.jpg, Thumbs.db, a.txt, and 4 more"
    ]
    assert scan(root, "data.images", "images/{}.jpg").passed == ["._a.jpg", ".a.jpg"]
    draw(root, "clean/a.jpg")
    assert scan(root, "data.images", "clean/{}.*").note() == []


def lines(root, text, need_mask=True):
    content = text if isinstance(text, bytes) else text.encode()
    (root / "list.txt").write_bytes(content)
    images, masks = scan(root, "data.images", "images/{}.*"), scan(root, "data.masks", "masks/{}.png")
    items = read_list("data.labeled", root, "list.txt", images, masks, need_mask)
    masks = [None if item.mask is None else os.path.relpath(item.mask, root) for item in items]
    return [(os.path.relpath(item.image, root), mask) for item, mask in zip(items, masks, strict=True)]


A, B = ("images/a.jpg", "masks/a.png"), ("images/my b.jpg", "masks/my b.png")


@pytest.mark.parametrize(
    "text",
    [
        "a\nmy b\n",
        "\n  a \r\n\tmy b\r\n\r\n",
        "a\rmy b",
        "images/a.jpg masks/a.png\nimages/my b.jpg\tmasks/my b.png",
        "images/a.jpg   masks/a.png\nimages/my b.jpg masks/my b.png",
        './images/a.jpg ./masks/a.png\n"images/my b.jpg" "masks/my b.png"',
        '\'images/a.jpg\' masks/a.png\n"images/my b.jpg"\t"masks/my b.png"',
        '"a"\n"my b"',
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_lines_of_a_list(root, text, encoding):
    draw(root, *A, *B)
    assert lines(root, text.encode(encoding)) == [A, B]


def test_lines_without_masks(root):
    draw(root, *A, *B)
    assert lines(root, "images/a.jpg\nimages/my b.jpg\n", need_mask=False) == [(A[0], None), (B[0], None)]


def test_names_with_quotes_and_hashes_are_taken_as_they_are(root):
    draw(
        root,
        "images/it's.jpg",
        "masks/it's.png",
        'images/say "a".jpg',
        'masks/say "a".png',
        "images/#1.jpg",
        "masks/#1.png",
    )
    assert [image for image, _ in lines(root, 'it\'s\nsay "a"\n#1\n')] == [
        "images/it's.jpg", 'images/say "a".jpg', "images/#1.jpg",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("images/a.jpg", "images/a.jpg is an image without its mask"),
        ("a b c", "expected an id, or an image and a mask with a tab between, got 'a b c'"),
        ("your b", r"not found: image of your, mask of your"),
        ("images/a.jpg masks/none.png", "not found: mask of images/a.jpg"),
        ("a\nmy b\n./images/a.jpg masks/a.png", r"more than once: .*images/a\.jpg$"),
        ("a\0", "expected text in UTF-8, found a byte of 0"),
        ("a\nmy b".encode("utf-16-le"), "expected text in UTF-8, found a byte of 0"),
        ("Straße".encode("latin-1"), "expected text in UTF-8: .* at byte 4"),
        (" \n", "is empty"),
    ],
)
def test_lines_that_cannot_be_used(root, text, message):
    draw(root, *A, *B)
    with pytest.raises(
        DataError, match=rf"^data\.labeled: .*list\.txt: {message}|^data\.labeled: .*list\.txt {message}"
    ):
        lines(root, text)


def test_paths(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert expand("~/x") == tmp_path / "x"
    assert str(expand("~no_such_user/x")) == "~no_such_user/x"
    assert str(expand("a/~b")) == "a/~b"
    make_folder(tmp_path / "new" / "er")
    assert list((tmp_path / "new" / "er").iterdir()) == []
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file", tmp_path / "file" / "run", expand("/proc/nowhere")):
        with pytest.raises(ValueError, match=f"^{path}: cannot be written: "):
            make_folder(path)
    with pytest.raises(ValueError, match="none: cannot be read: No such file"):
        read_text(tmp_path / "none")


def test_shorten():
    assert shorten(list("abcde")) == "a, b, c, d, e"
    assert shorten(list("abcdefg"), "; ") == "a; b; c; d; e; and 2 more"
