"""Each decoder against a straightforward Pillow crop and resize, and what they do with images that are none."""
import contextlib
import io
import os
import re
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import simplejpeg
import torch
from decoders import DECODERS, need
from PIL import Image

from ijepa_fast.data.decoder import build_decoder
from ijepa_fast.data.decoder_pillow import PillowDecoder
from ijepa_fast.data.decoder_turbo import TurboDecoder
from ijepa_fast.data.tune import main as tune
from ijepa_fast.errors import DecodeError, UserError

SIZE = 48


@pytest.fixture(scope="module", params=DECODERS)
def decoder(request):
    need(request.param)
    decoder = build_decoder(request.param, threads=2)
    yield decoder
    decoder.close()


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    """Smooth colours with some detail: like a photograph, unlike noise, on which any two resamplers differ."""
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def encode(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def exif_rotated() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees when shown
    return exif


KINDS = {
    "jpeg": lambda im: encode(im, "JPEG", quality=90),
    "jpeg 4:4:4": lambda im: encode(im, "JPEG", quality=95, subsampling=0),
    "progressive": lambda im: encode(im, "JPEG", quality=90, progressive=True),
    "gray": lambda im: encode(im.convert("L"), "JPEG", quality=90),
    "cmyk": lambda im: encode(im.convert("CMYK"), "JPEG", quality=90),
    "exif": lambda im: encode(im, "JPEG", quality=90, exif=exif_rotated()),
    "png": lambda im: encode(im, "PNG"),
    "png palette": lambda im: encode(im.quantize(64), "PNG"),
    "png alpha": lambda im: encode(im.convert("RGBA"), "PNG"),
    "png gray alpha": lambda im: encode(im.convert("LA"), "PNG"),
    "webp": lambda im: encode(im, "WEBP", quality=90),
    "bmp": lambda im: encode(im, "BMP"),
    "tiff": lambda im: encode(im, "TIFF"),
}
JPEGS = ("jpeg", "jpeg 4:4:4", "progressive", "gray", "exif")  # that turbo decodes itself
BOXES = np.array([[0, 0, 131, 97], [10, 20, 64, 64], [101, 0, 30, 97], [5, 90, 9, 7], [0, 0, 1, 1]], np.int32)


def straight(encoded: bytes, box, size: int = SIZE) -> np.ndarray:
    """The whole image to RGB, then the crop, then the resize: what torchvision does with a PIL image."""
    left, top, width, height = (int(v) for v in box)
    image = Image.open(io.BytesIO(encoded)).convert("RGB").crop((left, top, left + width, top + height))
    return np.array(image.resize((size, size), Image.Resampling.BILINEAR))


@pytest.mark.parametrize("kind", KINDS)
def test_pixels_are_those_of_a_straight_crop_and_resize(decoder, kind):
    encoded = KINDS[kind](photo(131, 97))
    ours = decoder.decode([encoded] * len(BOXES), BOXES, SIZE)
    assert ours.dtype == torch.uint8
    assert ours.shape == (len(BOXES), SIZE, SIZE, 3)
    theirs = np.stack([straight(encoded, box) for box in BOXES])
    difference = np.abs(ours.numpy().astype(int) - theirs)
    if type(decoder) is PillowDecoder or (isinstance(decoder, PillowDecoder) and kind not in JPEGS):
        assert difference.max() == 0
    elif isinstance(decoder, PillowDecoder):
        # Pillow's filter and its rounding between the two directions, but weights of 16 bits for Pillow's 22: what is
        # near a half may be rounded the other way.
        assert difference.max() <= 1
        assert difference.mean() < 0.1
    else:
        # Pillow rounds to uint8 between the two directions and in its filter weights, DALI does not: one level at most.
        # At the borders Pillow renormalises its filter and DALI repeats the last pixel: more there, on sharp edges.
        assert difference[:, 1:-1, 1:-1].max() <= 1
        assert difference.max() <= 4
        assert difference.mean() < 0.3


def test_no_pixel_outside_the_box_bleeds_in(decoder):
    image = np.zeros((60, 60, 3), np.uint8)
    image[20:40, 20:40] = 200
    pixels = decoder.decode([encode(Image.fromarray(image), "PNG")] * 2,
                            np.array([[20, 20, 20, 20], [0, 0, 20, 60]], np.int32), SIZE)
    assert (pixels[0] == 200).all()
    assert (pixels[1] == 0).all()


def test_a_batch_may_mix_kinds_and_change_its_length_and_size(decoder):
    encoded = [make(photo(131, 97, seed)) for seed, make in enumerate(KINDS.values())]
    boxes = np.tile(np.array([[7, 5, 90, 80]], np.int32), (len(encoded), 1))
    whole = decoder.decode(encoded, boxes, SIZE)
    for n, size in ((3, SIZE), (len(encoded), 32), (1, SIZE), (len(encoded), SIZE)):
        part = decoder.decode(encoded[:n], boxes[:n], size)
        assert part.shape == (n, size, size, 3)
        if size == SIZE:
            assert torch.equal(part, whole[:n])


def test_results_stay_as_they_were_when_the_next_batch_is_decoded(decoder):
    boxes = np.array([[0, 0, 131, 97]] * 4, np.int32)
    first = decoder.decode([encode(photo(131, 97, seed), "JPEG") for seed in range(4)], boxes, SIZE)
    before = first.clone()
    for seed in range(4, 24, 4):
        decoder.decode([encode(photo(131, 97, seed + k), "JPEG") for k in range(4)], boxes, SIZE)
    assert torch.equal(first, before)


def test_thread_count_changes_no_pixel(decoder):
    encoded = [make(photo(131, 97, seed)) for seed, make in enumerate(KINDS.values())]
    boxes = np.tile(np.array([[7, 5, 90, 80]], np.int32), (len(encoded), 1))
    other = type(decoder)(threads=3)
    assert torch.equal(decoder.decode(encoded, boxes, SIZE), other.decode(encoded, boxes, SIZE))
    other.close()


def test_several_threads_may_share_a_decoder(decoder):
    batches = [[encode(photo(131, 97, 10 * b + k), "JPEG") for k in range(3)] for b in range(6)]
    boxes = np.array([[3, 4, 100, 80]] * 3, np.int32)
    alone = [decoder.decode(batch, boxes, SIZE) for batch in batches]
    with ThreadPoolExecutor(3) as pool:
        together = list(pool.map(lambda batch: decoder.decode(batch, boxes, SIZE), batches))
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


GOOD = encode(photo(131, 97), "JPEG", quality=90)
BAD = {
    "garbage": b"\xff\xd8\xff" + b"no image at all" * 50,
    "empty": b"",
    "truncated": GOOD[: len(GOOD) // 2],
    "gif": encode(photo(131, 97), "GIF"),
}


@pytest.mark.parametrize("kind", BAD)
def test_an_image_that_cannot_be_decoded_is_named_by_its_position(decoder, kind):
    boxes = np.array([[0, 0, 131, 97]] * 4, np.int32)
    with pytest.raises(DecodeError) as caught:
        decoder.decode([GOOD, GOOD, BAD[kind], GOOD], boxes, SIZE)
    assert caught.value.position == 2
    assert caught.value.reason
    assert "BytesIO" not in caught.value.reason  # an address says nothing to the user
    assert torch.equal(decoder.decode([GOOD], boxes[:1], SIZE), decoder.decode([GOOD] * 4, boxes, SIZE)[:1])


@pytest.mark.parametrize("box", [(100, 0, 32, 97), (0, 1, 131, 97), (-1, 0, 30, 30), (0, -1, 30, 30)])
def test_a_box_outside_the_image_is_an_error_and_not_black_pixels(decoder, box):
    boxes = np.array([(0, 0, 131, 97), box], np.int32)
    with pytest.raises(DecodeError, match="131 x 97 pixels do not hold the box") as caught:
        decoder.decode([GOOD] * 2, boxes, SIZE)
    assert caught.value.position == 1


@pytest.fixture
def dali():
    need("dali")
    decoder = build_decoder("dali", threads=2)
    yield decoder
    decoder.close()


def test_good_images_never_take_dalis_slow_way(dali, monkeypatch):
    monkeypatch.setattr(dali, "_one_by_one", lambda *_: pytest.fail("a good batch was decoded one by one"))
    for n in (2, 7, 3, 9):  # more than the first pipeline was made for
        dali.decode([GOOD] * n, np.array([[0, 0, 131, 97]] * n, np.int32), SIZE)


def test_what_dali_refuses_pillow_decodes_and_dali_goes_on(dali):
    refused = encode(photo(131, 97), "TIFF", compression="lzma")
    boxes = np.array([[3, 4, 90, 80]] * 3, np.int32)
    good = dali.decode([GOOD] * 2, boxes[:2], SIZE)
    assert not np.array_equal(good[0], straight(GOOD, boxes[0]))  # so DALI's pixels can be told from Pillow's
    mixed = dali.decode([GOOD, refused, GOOD], boxes, SIZE)
    assert torch.equal(mixed[::2], good)
    assert np.array_equal(mixed[1], straight(refused, boxes[1]))
    assert torch.equal(dali.decode([GOOD] * 2, boxes[:2], SIZE), good)


def test_the_host_is_one_batch_ahead_of_the_device_and_holds_what_dali_lent(dali, monkeypatch):
    """With events of paper: the caller waits for each copy, the host for that before it."""
    happened = []

    class Event:
        def record(self):
            happened.append(("record", self.number))

        def synchronize(self):
            happened.append(("host waits", self.number))

    class Caller:
        def wait_event(self, event):
            happened.append(("caller waits", event.number))

    monkeypatch.setattr(torch.Tensor, "record_stream", lambda x, stream: happened.append(("is read by", type(stream))))
    lent = [torch.full((1, 2, 2, 3), i, dtype=torch.uint8) for i in range(2)]
    for number, pixels in enumerate(lent):
        happened.clear()
        monkeypatch.setattr(torch.cuda, "Event", type("Numbered", (Event,), {"number": number}))
        copy = dali._hand_over(pixels, Caller())
        assert torch.equal(copy, pixels)
        assert copy.data_ptr() != pixels.data_ptr()
        begun = [("record", number), ("caller waits", number), ("is read by", Caller)]
        assert happened == begun + [("host waits", number - 1)] * (number > 0)
        assert dali._lent[0] is pixels
    happened.clear()
    dali.close()
    assert happened == [("host waits", 1)]


@pytest.mark.gpu
def test_on_a_gpu_batches_are_those_of_the_cpu_whatever_is_in_flight():
    """No wait between them, results read on another stream while later ones are made, and a broken image amid."""
    pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    batches = [[encode(photo(500, 375, 10 * i + j), "JPEG", quality=90) for j in range(16)] for i in range(8)]
    boxes = np.array([[30, 20, 400, 300]] * 16, np.int32)
    batches[3][5] = batches[3][5][:1000]
    with contextlib.closing(build_decoder("dali", 2)) as host, contextlib.closing(
        build_decoder("dali", 2, "cuda")
    ) as device:
        expected = [host.decode_each(batch, boxes, SIZE) for batch in batches]
        with torch.cuda.stream(torch.cuda.Stream()):
            results = [device.decode_each(batch, boxes, SIZE) for batch in batches]
            sums = [pixels.float() for pixels, _ in results]
        torch.cuda.synchronize()
    for (pixels, reasons), (want, refused), read in zip(results, expected, sums, strict=True):
        assert reasons.keys() == refused.keys()
        assert torch.equal(read, pixels.float())
        assert (pixels.cpu().float() - want.float()).abs().mean() < 1  # another inverse transform, not other images


def test_a_missing_dali_is_a_user_error_when_asked_for_by_name(monkeypatch):
    monkeypatch.setitem(sys.modules, "ijepa_fast.data.decoder_dali", None)
    with pytest.raises(UserError, match=r"data\.decoder=pillow"):
        build_decoder("dali", threads=1)
    assert isinstance(build_decoder("auto", threads=1, device="cuda"), PillowDecoder)


@pytest.fixture
def turbo():
    need("turbo")
    with contextlib.closing(build_decoder("turbo", threads=2)) as decoder:
        yield decoder


@pytest.mark.parametrize("kind", KINDS)
def test_turbo_decodes_what_it_sees_as_pillow_does_and_leaves_the_rest(turbo, monkeypatch, kind):
    from ijepa_fast.data import decoder_turbo

    left, real = [], decoder_turbo.crop
    monkeypatch.setattr(decoder_turbo, "crop", lambda *arguments: left.append(kind) or real(*arguments))
    turbo.decode([KINDS[kind](photo(131, 97))], BOXES[:1], SIZE)
    assert left == ([] if kind in JPEGS else [kind])


def damage(jpeg: bytes, seed: int) -> bytes:
    """Bits flipped, or a piece cut out of the compressed pixels, with the end marker in place."""
    rng, damaged = np.random.default_rng(seed), bytearray(jpeg)
    if seed % 3 == 0:
        at = int(rng.integers(len(jpeg) // 2, len(jpeg) - 40))
        del damaged[at : at + int(rng.integers(1, 38))]
    else:
        for at in rng.integers(len(jpeg) // 8, len(jpeg) - 2, 2):
            damaged[at] ^= 1 << int(rng.integers(8))
    return bytes(damaged)


def test_a_damaged_jpeg_is_to_turbo_what_it_is_to_pillow(turbo):
    plain, progressive = (encode(photo(131, 97), "JPEG", quality=90, progressive=on) for on in (False, True))
    damaged = [damage((plain, progressive)[seed % 2], seed) for seed in range(90)]
    boxes = np.tile(np.array([[20, 10, 90, 80]], np.int32), (len(damaged), 1))
    with contextlib.closing(PillowDecoder(2)) as pillow:
        expected, reasons = pillow.decode_each(damaged, boxes, SIZE)
    pixels, same = turbo.decode_each(damaged, boxes, SIZE)
    assert same == reasons
    assert 5 < len(reasons) < 60  # Pillow paints over the others
    assert (pixels.int() - expected).abs().max() <= 1
    complained = [at for at, data in enumerate(damaged) if libjpeg_complains(data)]
    assert len(complained) > 30
    assert torch.equal(pixels[complained], expected[complained])


def libjpeg_complains(jpeg: bytes) -> bool:
    try:
        simplejpeg.decode_jpeg(jpeg, strict=True)
    except ValueError:
        return True
    return False


def test_turbo_starts_no_threads_beside_its_own(turbo):
    large, box = encode(photo(400, 400), "JPEG"), np.array([[20, 20, 300, 300]], np.int32)
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        before = set(os.listdir("/proc/self/task"))
        turbo.decode([large], box, SIZE)
        assert len(set(os.listdir("/proc/self/task")) - before) == 1
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(("instructions", "chosen"), [("AVX2", TurboDecoder), ("DEFAULT", PillowDecoder)])
def test_auto_on_a_cpu(instructions, chosen, monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: instructions)
    with contextlib.closing(build_decoder("auto", threads=1)) as decoder:
        assert type(decoder) is chosen


def test_scaled_is_pillow_where_the_crop_is_less_than_twice_the_output():
    boxes = np.array([[0, 0, 2 * SIZE - 1, 97], [3, 4, 90, 90]], np.int32)
    for encoded in (GOOD, KINDS["gray"](photo(131, 97)), KINDS["cmyk"](photo(131, 97)), KINDS["png"](photo(131, 97))):
        with contextlib.closing(build_decoder("scaled", 1)) as scaled, contextlib.closing(PillowDecoder(1)) as pillow:
            assert torch.equal(scaled.decode([encoded] * 2, boxes, SIZE), pillow.decode([encoded] * 2, boxes, SIZE))


@pytest.mark.parametrize("factor", [2, 4, 8])
def test_scaled_decodes_large_crops_nearly_as_pillow(factor):
    width, height = 24 * factor + 40, 24 * factor + 31
    images = [encode(photo(width, height, seed), "JPEG", quality=90) for seed in range(4)]
    images.append(encode(photo(width, height).convert("L"), "JPEG"))
    boxes = np.array([[n, 2 * n, 24 * factor + 9 * n, 24 * factor] for n in range(5)], np.int32)
    with contextlib.closing(build_decoder("scaled", 1)) as scaled, contextlib.closing(PillowDecoder(1)) as pillow:
        ours, theirs = scaled.decode(images, boxes, 24).int(), pillow.decode(images, boxes, 24).int()
        # The DCT's low frequencies are another low-pass filter than Pillow's triangle: smooth images are nearly alike,
        # and an image shifted by a pixel of the output, of about 10 levels here, is not.
        assert (ours - theirs).abs().float().mean() < 1.5
        assert not torch.equal(ours, theirs)
        shifted = (theirs[:, :, 1:] - theirs[:, :, :-1]).abs().float().mean()
        assert shifted > 3
        with pytest.raises(DecodeError, match="do not hold the box"):
            scaled.decode(images[:1], np.array([[100, 0, 24 * factor, 24 * factor]], np.int32), 24)


def test_tune_compares_the_decoders(tmp_path, capsys):
    for n in range(6):
        (tmp_path / "r").mkdir(exist_ok=True)
        (tmp_path / "r" / f"{n}.jpg").write_bytes(GOOD if n else b"nothing")
    (tmp_path / "c.yaml").write_text(f"data: {{root: {tmp_path}/r, image_size: 48}}\nmodel: {{patch_size: 16}}\n")
    assert tune([str(tmp_path / "c.yaml"), "--rounds", "1", "--step-ms", "100"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"pillow +1 +[\d,]+ +\d+% of the time +0\.00, 0", out)
    assert re.search(r"scaled +1 ", out)
    assert re.search(r"turbo +1 .* 0\.\d\d, [01]\b", out)
    assert "a step of 2048 images in 100 ms needs 20,480 images/s" in out
    assert tune([str(tmp_path / "c.yaml"), "--images", "0"]) == 2
