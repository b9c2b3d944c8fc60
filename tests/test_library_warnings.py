"""What Pillow warns of is named, said once, counted, and never raw on stderr; other warnings go the usual way."""
import contextlib
import os
import shutil
import struct
import subprocess
import sys
import tarfile
import threading
import warnings
from collections import Counter

import numpy as np
import odd_images
import pytest
from decoders import need

from ijepa_fast.cli import command
from ijepa_fast.config import DataConfig
from ijepa_fast.data import library_warnings
from ijepa_fast.data.decoder import build_decoder
from ijepa_fast.data.decoder_pillow import PillowDecoder
from ijepa_fast.data.images import center_crops, index_images
from ijepa_fast.data.index import build_index
from ijepa_fast.data.index_cli import main as index_main
from ijepa_fast.data.library_warnings import IMAGES, MESSAGES, Account, Taken, about, batch, finish, take
from ijepa_fast.data.pipeline import ImageSource

SIZE = 24
BOX = np.array([[0, 0, odd_images.WIDTH, odd_images.HEIGHT]], np.int32)
PALETTE = "Pillow warns: Palette images with Transparency expressed in bytes should be converted to RGBA images"

_REGISTRY: dict = {}  # Python's, of what was shown already; Pillow's modules have one each


def damaged(left: int, image: bytes | None = None) -> bytes:
    """A JPEG whose EXIF block ends `left` bytes after the beginning of its first entry; Pillow's words name them."""
    jpeg = image or odd_images.encode(odd_images.photo(left), "JPEG")
    exif = b"Exif\0\0MM\0*" + struct.pack(">IH", 8, 1) + bytes(left)
    return jpeg[:2] + odd_images.segment(0xE1, exif) + jpeg[2:]


def words(left: int) -> str:
    return f"Pillow warns: Corrupt EXIF data. Expecting to read 12 bytes but only got {left}."


def pillow_warns(message: str) -> None:
    warnings.warn_explicit(message, UserWarning, f"{os.sep}PIL{os.sep}Image.py", 1, "PIL.Image", registry=_REGISTRY)


@pytest.fixture(autouse=True)
def _nothing_before():
    finish()
    yield
    finish()


@pytest.fixture
def shown(monkeypatch):
    """Messages that went the usual way."""
    messages = list[str]()
    monkeypatch.setattr(warnings, "showwarning", lambda message, *_, **__: messages.append(str(message)))
    return messages


@pytest.mark.long
def test_a_run_names_the_image_once_and_counts(photographs, tiny_config, tmp_path):
    root = tmp_path / "data"
    shutil.copytree(photographs, root)
    one = root / "class_1" / "3.jpg"
    one.write_bytes(damaged(5, one.read_bytes()))
    done = subprocess.run(
        [sys.executable, "-m", "ijepa_fast.train", "--config", tiny_config, f"data.root={root}", "optim.epochs=2",
         "optim.warmup_epochs=1", f"train.folder={tmp_path / 'run'}"],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert done.stdout.count("Corrupt EXIF") == 1
    assert f"\n{one}: {words(5)}\n" in done.stdout
    assert "\nwarnings    2 of libraries on images\n" in done.stdout  # 40 images, all in each of two epochs


def test_threads_that_decode_at_once_name_their_own_image(shown):
    images = [damaged(left) for left in range(10)]
    with contextlib.closing(PillowDecoder(2)) as decoder:
        real, both = decoder._crop, threading.Barrier(2)

        def crop(*arguments):
            both.wait(20)  # neither thread goes on before the other, too, is at an image
            return real(*arguments)

        decoder._crop = crop
        with batch("photo {}.jpg".format):
            decoder.decode(images, BOX.repeat(10, 0), SIZE)
    taken = take()
    assert sorted(taken.new) == [(f"photo {left}.jpg", words(left)) for left in range(10)]
    assert taken.raised == 10
    assert shown == []


def test_other_warnings_go_the_usual_way(shown):
    def elsewhere():
        warnings.warn("of another thread", stacklevel=1)

    with about(lambda: "a.jpg"):
        warnings.warn("of an image", stacklevel=1)
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
    warnings.warn("after it", stacklevel=1)
    assert shown == ["of another thread", "after it"]
    assert take() == ([("a.jpg", "a library warns: of an image")], 1)


def test_catch_warnings_takes_the_hook_away_for_a_moment_only(shown):
    image = damaged(3)
    with contextlib.closing(PillowDecoder(1)) as decoder, batch(lambda _: "a.jpg"):
        for expected in (1, 2, 3):
            with warnings.catch_warnings(record=True) as recorded:
                warnings.simplefilter("default")
                decoder.decode([image], BOX, SIZE)
                warnings.warn("for the block", stacklevel=1)
            assert [str(one.message) for one in recorded] == ["for the block"]
            warnings.warn(f"number {expected}", stacklevel=1)
        decoder.decode([image], BOX, SIZE)
    assert shown == ["number 1", "number 2", "number 3"]
    assert take() == ([("a.jpg", words(3))], 4)


def test_only_the_first_images_are_named():
    account, lines = Account(), []
    for _ in range(2):
        for n in range(IMAGES + 3):
            with about(lambda: f"{n}.jpg"):  # noqa: B023
                pillow_warns("odd")
        lines += account.add([take()])
    assert lines == [
        *(f"{n}.jpg: Pillow warns: odd" for n in range(IMAGES)),
        f"warnings on more images than these {IMAGES} are only counted",
    ]
    assert account.raised == 2 * (IMAGES + 3)
    assert len(library_warnings._known) == IMAGES + 1


def test_only_the_first_messages_of_an_image_are_said():
    with about(lambda: "a.tif"):
        for n in range(MESSAGES + 5):
            pillow_warns(f"tag {n}")
    taken = take()
    assert (len(taken.new), taken.raised) == (MESSAGES, MESSAGES + 5)


def test_a_name_that_is_no_utf_8_can_be_printed_anywhere():
    with about(lambda: os.fsdecode(b"caf\xe9.jpg")):
        pillow_warns("odd")
    assert take().new == [(r"caf\udce9.jpg", "Pillow warns: odd")]


def test_ranks_that_met_the_same_image_say_it_once():
    account = Account()
    assert account.add([Taken([("a", "odd")], 2), Taken([("a", "odd"), ("b", "odd")], 3)]) == ["a: odd", "b: odd"]
    assert account.add([Taken([], 1), Taken([("a", "odd"), ("a", "other")], 2)]) == ["a: other"]
    assert account.raised == 8


def test_members_of_tars_and_images_in_another_s_place_have_their_names(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "files").mkdir()
    with tarfile.open(tmp_path / "data" / "a.tar", "w") as tar:
        for name, data in (("0.jpg", damaged(1)), ("1.jpg", b"nothing"), ("2.jpg", damaged(2))):
            (tmp_path / "files" / name).write_bytes(data)
            tar.add(tmp_path / "files" / name, name)
    index = build_index(tmp_path / "data", cache_dir=tmp_path / "cache")
    source = ImageSource(index, DataConfig(root=index.root, image_size=SIZE, decoder="pillow", threads=2))
    with contextlib.closing(source):
        list(source.center_crops(np.arange(3), 3))
    taken, tar = take(), f"{index.root}/a.tar"
    assert Counter(taken.new) == Counter([(f"{tar}: 0.jpg", words(1)), (f"{tar}: 2.jpg", words(2))])
    assert taken.raised == 3  # 2.jpg stands in for 1.jpg too


def test_turbo_names_the_image_once(shown):
    need("turbo")
    images = [damaged(3), odd_images.encode(odd_images.photo(), "JPEG"), damaged(5)]
    with contextlib.closing(build_decoder("turbo", 2)) as decoder, batch("photo {}".format):
        decoder.decode(images, BOX.repeat(3, 0), SIZE)
    taken = take()
    assert sorted(taken.new) == [("photo 0", words(3)), ("photo 2", words(5))]
    assert taken.raised == 2
    assert shown == []


def test_dali_leaves_names_with_the_images_that_pillow_decodes():
    need("dali")
    sound = dict(odd_images.sound())
    images = [sound["jpeg.jpg"], sound["png.png"], sound["palette with transparency.png"]]
    with contextlib.closing(build_decoder("dali", 1)) as decoder, batch("photo {}".format):
        decoder.decode(images, BOX.repeat(3, 0), SIZE)
    assert take() == ([("photo 2", PALETTE)], 1)


def test_verify_says_them_in_its_report(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    for left in (4, 7):
        (tmp_path / "data" / f"{left}.jpg").write_bytes(damaged(left))
    (tmp_path / "data" / "sound.jpg").write_bytes(odd_images.encode(odd_images.photo(), "JPEG"))
    assert index_main(["data", "--verify"]) == 0
    out, err = capfd.readouterr()
    root = os.path.realpath("data")
    for left in (4, 7):
        assert out.count(f"{root}/{left}.jpg: {words(left)}\n") == 1
    assert out.endswith("\nwarnings    2 of libraries on images\n")
    assert "0 bad" in out
    assert err.strip() == ""  # the bar leaves a line


def test_a_command_without_a_report_says_them_at_its_end(tmp_path, capfd, shown):
    tiff = odd_images.encode(odd_images.photo(), "TIFF", tiffinfo={33432: "x" * 99})  # the copyright: its last tag
    at = tiff.index(struct.pack("<HHI", 33432, 2, 100)) + 8
    far = struct.pack("<I", 1 << 20)  # where it is said to be; of a TIFF, Pillow reads the header for the index as well
    jpg, tif = (os.path.realpath(tmp_path / name) for name in ("a.jpg", "b.tif"))
    for name, data in ((jpg, damaged(6)), (tif, tiff[:at] + far + tiff[at + 4 :])):
        with open(name, "wb") as file:
            file.write(data)

    @command
    def look(argv):
        list(center_crops(index_images([jpg, tif]), [0, 1, 0], SIZE, batch=2))

    for _ in range(2):  # the second in this process begins anew
        assert look() == 0
        out, err = capfd.readouterr()
        assert out == ""
        first, second = sorted(err.splitlines())
        assert first == f"warning: {jpg}: {words(6)}"
        assert second.startswith(f"warning: {tif}: Pillow warns: ")
    assert shown == []


def test_a_command_does_not_say_what_came_before_it(capfd):
    with about(lambda: "earlier.jpg"):
        warnings.warn_explicit("odd", UserWarning, "PIL/Image.py", 1)
    assert command(lambda argv: None)([]) == 0
    assert capfd.readouterr().err == ""
    assert take() == Taken([], 0)
