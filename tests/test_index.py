"""What the index finds in a folder, and that its cache is neither stale nor trusted when damaged."""
import os
import time

import numpy as np
import pytest
from PIL import Image

from ijepa_fast.data import index as index_module
from ijepa_fast.data import scan as scan_module
from ijepa_fast.data import walk as walk_module
from ijepa_fast.data.index import RECORD, build_index
from ijepa_fast.data.table import load_index
from ijepa_fast.errors import UserError


def write(path, width=8, height=6, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (width, height), (10, 200, 30)).save(path, **options)


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


@pytest.fixture
def root(tmp_path):
    """Two classes, one of them nested, with every suffix, and files that are no images."""
    root = tmp_path / "photos"
    for n, suffix in enumerate(("jpg", "JPEG", "png", "webp", "bmp", "tif", "TIFF")):
        write(root / "b" / f"{n}.{suffix}", 10 + n, 20 + n)
    write(root / "a" / "deep" / "er" / "ü ☃.jpg", 31, 17)
    (root / "a" / "notes.txt").write_text("not an image")
    (root / "a" / "._0.jpg").write_bytes(b"what macOS leaves behind")
    (root / "empty").mkdir()
    return root


def read_headers_is_forbidden(*_):
    raise AssertionError("the cache was not used")


def test_folders_become_records(root, cache):
    index = build_index(root, cache_dir=cache, threads=2)
    assert index.records.dtype == RECORD
    names = [os.path.relpath(index.path(i), root) for i in range(len(index))]
    in_b = ["b/0.jpg", "b/1.JPEG", "b/2.png", "b/3.webp", "b/4.bmp", "b/5.tif", "b/6.TIFF"]
    assert names == ["a/deep/er/ü ☃.jpg", *in_b]
    assert index.class_names == ("a", "b")
    records = index.records
    assert records["label"].tolist() == [0] + [1] * 7
    assert records["width"].tolist() == [31, *range(10, 17)]
    assert records["height"].tolist() == [17, *range(20, 27)]
    assert records["container"].tolist() == list(range(8))
    assert records["size"].tolist() == [os.path.getsize(root / name) for name in names]
    assert not records["offset"].any()


def test_images_in_the_root_itself_have_no_label(tmp_path, cache):
    write(tmp_path / "flat" / "y.jpg")
    write(tmp_path / "flat" / "x.jpg")
    index = build_index(tmp_path / "flat", cache_dir=cache)
    assert index.records["label"].tolist() == [-1, -1]
    assert index.class_names == ()
    write(tmp_path / "flat" / "c" / "z.jpg")
    index = build_index(tmp_path / "flat", cache_dir=cache)
    assert index.records["label"].tolist() == [0, -1, -1]
    assert index.class_names == ("c",)


def test_order_is_bytewise_whatever_the_file_system_says(tmp_path, cache):
    names = ["B.jpg", "a.jpg", "a/c.jpg", "a-b.jpg", "ä.jpg", "Z/1.jpg", "10.jpg", "9.jpg"]
    for name in names:
        write(tmp_path / "r" / name)
    index = build_index(tmp_path / "r", cache_dir=cache)
    assert [os.path.relpath(index.path(i), tmp_path / "r") for i in range(8)] == sorted(names, key=str.encode)


def test_sizes_are_those_before_the_exif_rotation(tmp_path, cache):
    exif = Image.Exif()
    exif[0x0112] = 6
    write(tmp_path / "r" / "a.jpg", 40, 20, exif=exif)
    index = build_index(tmp_path / "r", cache_dir=cache)
    assert (index.records["width"][0], index.records["height"][0]) == (40, 20)


def test_links_are_followed_but_not_in_circles(tmp_path, cache):
    write(tmp_path / "elsewhere" / "x.jpg")
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "class").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "r")
    index = build_index(tmp_path / "r", cache_dir=cache)
    assert [os.path.relpath(index.path(i), tmp_path / "r") for i in range(len(index))] == ["class/x.jpg"]


def test_names_that_are_no_unicode(tmp_path, cache):
    (tmp_path / "r").mkdir()
    write(tmp_path / "x.jpg")
    try:
        os.rename(os.fsencode(tmp_path / "x.jpg"), os.fsencode(tmp_path / "r") + b"/\xff\xfe.jpg")
    except OSError:
        pytest.skip("this file system refuses names that are not UTF-8")
    for _ in range(2):
        index = build_index(tmp_path / "r", cache_dir=cache)
        assert os.path.getsize(index.path(0)) == index.records["size"][0]


def test_the_cache_gives_the_same_index_without_reading_a_header(root, cache, monkeypatch):
    built = build_index(root, cache_dir=cache)
    monkeypatch.setattr(index_module, "scan", read_headers_is_forbidden)
    cached = build_index(root, cache_dir=cache)
    assert np.array_equal(cached.records, built.records)
    assert cached.class_names == built.class_names
    assert [cached.path(i) for i in range(len(cached))] == [built.path(i) for i in range(len(built))]
    assert not cached.records.flags.writeable
    link = root.parent / "link"
    link.symlink_to(root)
    assert build_index(link, cache_dir=cache).root == cached.root  # keyed by the real path


@pytest.mark.parametrize("change", ["add", "remove", "rename folder", "new folder"])
def test_a_change_of_the_folders_is_noticed(root, cache, change):
    before = len(build_index(root, cache_dir=cache))
    if change == "add":
        write(root / "a" / "deep" / "new.jpg")
    elif change == "remove":
        (root / "b" / "0.jpg").unlink()
    elif change == "rename folder":
        (root / "a").rename(root / "c")
    else:
        write(root / "a" / "other" / "new.png")
    index = build_index(root, cache_dir=cache)
    assert len(index) - before == {"add": 1, "remove": -1, "rename folder": 0, "new folder": 1}[change]
    assert all(os.path.exists(index.path(i)) for i in range(len(index)))


def damaged(data: bytes):
    body = data.index(b"\n") + 1
    yield "empty", b""
    yield "cut in the header", data[: body // 2]
    yield "cut in the body", data[: (body + len(data)) // 2]
    yield "longer", data + b"\0"
    yield "a flipped bit", data[: body + 20] + bytes([data[body + 20] ^ 1]) + data[body + 21 :]
    yield "another class", data.replace(b'["a", "b"]', b'["a", "c"]', 1)
    yield "an older format", data.replace(b"index 3", b"index 2", 1)
    yield "another root", data.replace(b"photos", b"fotos!", 1)
    yield "a pickle", b"\x80\x04\x95" + data
    yield "JSON, but no object", b"[1]\n" + data[body:]
    yield "zeros", bytes(len(data))
    yield "sizes that are no numbers", data.replace(b'"bytes": {"records": ', b'"bytes": {"records":"', 1)


def test_a_damaged_cache_is_built_again(root, cache):
    built = build_index(root, cache_dir=cache)
    (file,) = cache.iterdir()
    good = file.read_bytes()
    for what, data in damaged(good):
        assert data != good, what
        file.write_bytes(data)
        index = build_index(root, cache_dir=cache)
        assert np.array_equal(index.records, built.records), what
        assert load_index(str(file), built.root, verify=True) is not None, what
    assert [path.name for path in cache.iterdir()] == [file.name]  # nothing half-written is left


def test_a_cache_folder_that_cannot_be_written_only_warns(root, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.warns(UserWarning, match="built again next time"):
        assert len(build_index(root, cache_dir=tmp_path / "file" / "cache")) == 8


def test_nothing_is_written_where_that_is_asked_for(root, cache):
    assert len(build_index(root, cache_dir=cache, write_cache=False)) == 8
    assert not cache.exists()


def test_the_cache_lies_in_the_users_cache_folder(root, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    build_index(root)
    assert [path.suffix for path in (tmp_path / "xdg" / "ijepa_fast").iterdir()] == [".index"]


def test_what_is_wrong_is_said_in_one_sentence(tmp_path, cache):
    with pytest.raises(UserError, match="nowhere does not exist"):
        build_index(tmp_path / "nowhere", cache_dir=cache)
    (tmp_path / "file.jpg").write_text("x")
    with pytest.raises(UserError, match="must be a folder"):
        build_index(tmp_path / "file.jpg", cache_dir=cache)
    (tmp_path / "r" / "x").mkdir(parents=True)
    with pytest.raises(UserError, match=r"no image below .*: no other files seen; images end in \.bmp, \.jfif"):
        build_index(tmp_path / "r", cache_dir=cache)
    (tmp_path / "r" / "x" / "a.gif").write_text("x")
    with pytest.raises(UserError, match="1 other file seen"):
        build_index(tmp_path / "r", cache_dir=cache)


@pytest.mark.parametrize(
    ("data", "reason"), [(b"", "it is empty"), (b"GIF89a", "it is a GIF file and not a JPEG"),
                         (b"\xff\xd8\xff", "it is cut short: a JPEG that ends in its header")])  # fmt: skip
def test_an_image_without_a_header_is_named(root, cache, capsys, data, reason):
    (root / "b" / "bad.jpg").write_bytes(data)
    index = build_index(root, cache_dir=cache)
    assert f"warning: {root}/b/bad.jpg cannot be read as an image: {reason}" in capsys.readouterr().err
    bad = index.records[[index.path(i).endswith("bad.jpg") for i in range(len(index))]]
    assert bad[["width", "height", "size", "label"]].tolist() == [(0, 0, len(data), 1)]


def test_long_work_shows_a_bar(root, cache, monkeypatch, capsys):
    monkeypatch.setattr(index_module, "_PATIENCE_S", -1.0)
    monkeypatch.setattr(walk_module, "FILES_A_UNIT", 2)
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich draws bars only on what it takes for a terminal
    real = scan_module._read_file_header
    monkeypatch.setattr(scan_module, "_read_file_header", lambda path: time.sleep(0.05) or real(path))
    build_index(root, cache_dir=cache, threads=1)
    captured = capsys.readouterr()
    assert "reading image headers" in captured.err
    assert captured.out == ""
