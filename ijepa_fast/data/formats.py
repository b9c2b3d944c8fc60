"""What an encoded image says about itself, and whether it is whole: read from its bytes, before anything is decoded.

Every decoder is given the result of `prepare`, so which images are bad does not depend on the decoder. What is not
pixels has no influence: text and profile chunks of a PNG are cut out, and junk behind an image is left alone.
"""
import io
import struct
import zlib
from typing import NamedTuple

# Imported by name, so that the formats we read are registered once, before any thread asks for them.
from PIL import (
    BmpImagePlugin,  # noqa: F401
    Image,
    JpegImagePlugin,  # noqa: F401
    PngImagePlugin,  # noqa: F401
    PpmImagePlugin,  # noqa: F401
    TiffImagePlugin,  # noqa: F401
    WebPImagePlugin,  # noqa: F401
)

from ijepa_fast.data import library_warnings

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "PPM")  # whatever a file's suffix says
NAMES = "a JPEG, PNG, WebP, BMP, TIFF, PPM or PGM image"
MAX_PIXELS = 178_956_970  # above this Pillow takes an image for a decompression bomb; `data.max_pixels` changes it
MAX_UNZIPPED = 1 << 28  # bytes that a member which is gzip inside may unpack to

# `MAX_PIXELS` is checked here, before an image is opened. Pillow's own limit has no key.
Image.MAX_IMAGE_PIXELS = None

_GZIP = b"\x1f\x8b"
_OTHERS = ((b"GIF8", "a GIF"), (b"\0\0\1\0", "an ICO"), (b"8BPS", "a PSD"), (b"\0\0\0\x0cjP  ", "a JPEG 2000"),
           (b"\xff\x0a", "a JPEG XL"), (b"<svg", "an SVG"), (b"%PDF", "a PDF"), (b"<!DOC", "an HTML"),
           (b"<html", "an HTML"), (b"PK\3\4", "a ZIP"))


class ImageError(ValueError):
    """These bytes are no image that can be used; the message is the reason, without a path."""


class More(Exception):
    """The header goes on after the bytes that were given."""


class Header(NamedTuple):
    kind: str  # of FORMATS
    width: int  # pixels as stored: an EXIF rotation is not applied
    height: int
    scan: int = 0  # JPEG: where the compressed pixels begin


def read_header(data: bytes, *, complete: bool = True) -> Header:
    """The header of an image of which `data` is the beginning, or all if `complete`.

    Raises `ImageError` for what is no image or has a kind of pixels that nothing here can turn into 8 bits, and `More`
    where a longer beginning is needed. Of an image that is gzip inside, it is the header inside.
    """
    if data.startswith(_GZIP):
        if not complete:
            raise More
        data = unzip(data)
    if data.startswith(b"\xff\xd8\xff"):
        header = _jpeg_header(data, complete)
    elif data.startswith(b"\x89PNG\r\n\x1a\n"):
        header = _png_header(data, complete)
    elif not complete:
        raise More
    else:
        header = _pillow_header(data)
    if header.width < 1 or header.height < 1:
        raise ImageError(f"its header says {header.width} x {header.height} pixels")
    return header


def prepare(data: bytes, width: int, height: int, max_pixels: int = MAX_PIXELS) -> bytes:
    """What a decoder is to be given for the file contents `data` of an image indexed as `width` x `height`.

    Unpacks gzip, and raises `ImageError` for what is no image, not whole, too large, or not the image of the index.
    """
    if not data:
        raise ImageError("it is empty")
    if data.startswith(_GZIP):
        data = unzip(data)
    header = read_header(data)
    if (pixels := header.width * header.height) > max_pixels:
        raise ImageError(f"it has {pixels:,} pixels, more than data.max_pixels={max_pixels:,}")
    if (header.width, header.height) != (width, height):
        was = f"{width} x {height} pixels" if width else "unreadable"
        raise ImageError(f"it was {was} when it was indexed, and is {header.width} x {header.height} now")
    if header.kind == "JPEG":
        # Compressed pixels hold no end marker; a thumbnail in the header may.
        if data.rfind(b"\xff\xd9", header.scan) < 0:
            raise ImageError("it is cut short: a JPEG without its end marker")
    elif header.kind == "PNG":
        return _png_pixels(data)
    elif header.kind == "WEBP" and int.from_bytes(data[4:8], "little") + 8 > len(data):
        raise ImageError("it is cut short: a WebP shorter than it says")
    return data


def unzip(data: bytes) -> bytes:
    try:
        unpacker = zlib.decompressobj(wbits=31)
        plain = unpacker.decompress(data, MAX_UNZIPPED)
    except zlib.error as error:
        raise ImageError(f"it is gzip inside, and damaged: {error}") from None
    if not unpacker.eof:
        fault = "cut short" if len(plain) < MAX_UNZIPPED else f"unpacks to more than {MAX_UNZIPPED >> 20} MiB"
        raise ImageError(f"it is gzip inside, and {fault}")
    return plain


def is_common(data: bytes) -> bool:
    """Whether it is of the kinds that decoders agree on: JPEG and WebP. The rest is left to Pillow.

    Of PNG, DALI decodes no pixel differently, but its libraries write their complaints to stderr, without a name.
    """
    return data.startswith(b"\xff\xd8\xff") or data[8:12] == b"WEBP"


def _jpeg_header(data: bytes, complete: bool) -> Header:
    """ITU-T T.81, B.2: marker segments up to the first scan."""
    at, size = 2, None
    while True:
        while data[at : at + 1] == b"\xff" and data[at + 1 : at + 2] == b"\xff":  # fill bytes
            at += 1
        segment = data[at : at + 10]
        if len(segment) < 10:
            if not complete:
                raise More
            raise ImageError("it is cut short: a JPEG that ends in its header")
        marker, length = segment[1], int.from_bytes(segment[2:4])
        if segment[0] != 0xFF or marker == 0xD9 or length < 2:
            raise ImageError("its JPEG header is damaged")
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            if segment[4] != 8:
                raise ImageError(f"it is a JPEG of {segment[4]} bits, and only those of 8 are read")
            size = int.from_bytes(segment[7:9]), int.from_bytes(segment[5:7])
            if not complete:
                return Header("JPEG", *size)
        if marker == 0xDA:
            if size is None:
                raise ImageError("its JPEG header is damaged: it gives no size")
            return Header("JPEG", *size, at)
        at += 2 + length


def _png_header(data: bytes, complete: bool) -> Header:
    if len(data) < 33 or data[12:16] != b"IHDR":
        if len(data) < 33 and not complete:
            raise More
        raise ImageError("its PNG header is damaged")
    return Header("PNG", *struct.unpack(">II", data[16:24]))


def _png_pixels(data: bytes) -> bytes:
    """The chunks that pixels are made of, with their checksums verified."""
    view, at, other = memoryview(data), 8, False
    pieces: list[bytes | memoryview] = [data[:8]]
    while True:
        if at + 12 > len(data):
            raise ImageError("it is cut short: a PNG without its end chunk")
        end = at + 12 + int.from_bytes(data[at : at + 4])
        kind = data[at + 4 : at + 8]
        if kind in (b"IHDR", b"PLTE", b"IDAT", b"tRNS", b"IEND"):
            if end > len(data):
                raise ImageError("it is cut short: a PNG without its end chunk")
            if zlib.crc32(view[at + 4 : end - 4]) != int.from_bytes(data[end - 4 : end]):
                raise ImageError(f"its PNG chunk {kind.decode()} is damaged")
            pieces.append(view[at:end])
            if kind == b"IEND":
                return b"".join(pieces) if other else data
        elif kind[:1].isupper():
            raise ImageError("its PNG chunks are damaged")
        else:
            other = True
        at = end


def _pillow_header(data: bytes) -> Header:
    try:
        with library_warnings.unsaid(), Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if image.mode == "F" or (image.mode == "I" and image.format != "PPM"):
                kind = "float" if image.mode == "F" else "32-bit integer"
                raise ImageError(f"its pixels are {kind} numbers, and nothing says which are black and white")
            return Header(str(image.format).replace("MPO", "JPEG"), *image.size)
    except ImageError:
        raise
    except Image.UnidentifiedImageError:
        raise ImageError(_what_it_is(data)) from None
    except Exception as error:  # Pillow's plugins raise whatever a malformed header leads them to
        raise ImageError(f"its header is damaged: {' '.join(str(error).split()) or type(error).__name__}") from None


def _what_it_is(data: bytes) -> str:
    if not data:
        return "it is empty"
    if not data.strip(b"\0"):
        return "it holds nothing but zeros"
    found = next((name for start, name in _OTHERS if data.startswith(start)), None)
    if data[4:8] == b"ftyp":
        found = {b"avif": "an AVIF", b"heic": "a HEIC"}.get(data[8:12], "an MP4 or HEIF")
    return f"it is {found} file and not {NAMES}" if found else f"it is not {NAMES}"
