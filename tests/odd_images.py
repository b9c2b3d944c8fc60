"""Odd and damaged image files, by name: what a tree of fourteen million files holds somewhere."""
import gzip
import io
import struct
import zlib
from collections.abc import Iterator

import numpy as np
from PIL import Image

WIDTH, HEIGHT = 61, 47


def photo(seed: int = 0) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)


def encode(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, depth: int, color: int, rows: bytes, *more: bytes) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(more) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def deep_png(channels: int) -> bytes:
    ramp = np.linspace(0, 65535, WIDTH, dtype=">u2")
    row = b"\0" + np.repeat(ramp, channels).tobytes()
    return png(WIDTH, HEIGHT, 16, {1: 0, 2: 4, 3: 2, 4: 6}[channels], row * HEIGHT)


def segment(marker: int, data: bytes) -> bytes:
    return b"\xff" + bytes([marker]) + struct.pack(">H", len(data) + 2) + data


def sound() -> Iterator[tuple[str, bytes]]:
    """Files that every decoder has to decode."""
    rgb = photo()
    jpeg, plain = encode(rgb, "JPEG", quality=90), encode(rgb, "PNG")
    exif = Image.Exif()
    exif[0x0112] = 6
    yield "jpeg.jpg", jpeg
    yield "444.jpg", encode(rgb, "JPEG", quality=95, subsampling=0)
    yield "422.jpg", encode(rgb, "JPEG", quality=95, subsampling=1)
    yield "progressive.jpg", encode(rgb, "JPEG", progressive=True)
    yield "optimized.jpeg", encode(rgb, "JPEG", optimize=True)
    yield "restart markers.jpg", encode(rgb, "JPEG", restart_marker_blocks=1)
    yield "gray.jpg", encode(rgb.convert("L"), "JPEG")
    yield "cmyk.jpg", encode(rgb.convert("CMYK"), "JPEG")
    yield "rotated by exif.jpg", encode(rgb, "JPEG", exif=exif)
    yield "damaged exif.jpg", jpeg[:2] + segment(0xE1, b"Exif\0\0MM\0*\xff\xff\xff\xff") + jpeg[2:]
    yield "large comment.jpg", jpeg[:2] + segment(0xFE, b"x" * 65000) * 3 + jpeg[2:]
    yield "end marker in the header.jpg", jpeg[:2] + segment(0xFE, b"\xff\xd9") + jpeg[2:]
    yield "junk behind.jpg", jpeg + b"junk" * 1000
    yield "zeros behind.jpg", jpeg + bytes(5000)
    yield "fill bytes.jpg", jpeg[:2] + b"\xff\xff\xff" + jpeg[2:]
    yield "profile.jpg", encode(rgb, "JPEG", icc_profile=bytes(3000))
    yield "jfif.jfif", jpeg
    yield "gzip inside.jpg", gzip.compress(jpeg)
    yield "a png.jpg", plain
    yield "a jpeg.png", jpeg
    yield "a webp.jpeg", encode(rgb, "WEBP")
    yield "png.png", plain
    yield "interlaced gray 1 bit.png", encode(rgb.convert("1"), "PNG")
    yield "palette.png", encode(rgb.quantize(32), "PNG")
    yield "palette with transparency.png", encode(rgb.quantize(32), "PNG", transparency=bytes(range(32)))
    yield "gray.png", encode(rgb.convert("L"), "PNG")
    yield "gray alpha.png", encode(rgb.convert("LA"), "PNG")
    yield "alpha.png", encode(rgb.convert("RGBA"), "PNG")
    yield "16 bit gray.png", deep_png(1)
    yield "16 bit gray alpha.png", deep_png(2)
    yield "16 bit colour.png", deep_png(3)
    yield "16 bit alpha.png", deep_png(4)
    yield "3 MB of text.png", plain[:33] + chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(3_000_000))) + plain[33:]
    yield "damaged text.png", plain[:33] + chunk(b"tEXt", b"key\0value")[:-1] + b"?" + plain[33:]
    yield "junk behind.png", plain + b"junk" * 1000
    yield "lossy.webp", encode(rgb, "WEBP", quality=80)
    yield "lossless.webp", encode(rgb, "WEBP", lossless=True)
    yield "alpha.webp", encode(rgb.convert("RGBA"), "WEBP")
    yield "bmp.bmp", encode(rgb, "BMP")
    yield "palette.bmp", encode(rgb.quantize(16), "BMP")
    yield "tiff.tif", encode(rgb, "TIFF")
    yield "lzw.tiff", encode(rgb, "TIFF", compression="tiff_lzw")
    yield "jpeg inside.tiff", encode(rgb, "TIFF", compression="jpeg")
    yield "16 bit.tif", encode(Image.fromarray(np.full((HEIGHT, WIDTH), 30000, np.uint16)), "TIFF")
    yield "ppm.ppm", encode(rgb, "PPM")
    yield "pgm.pgm", encode(rgb.convert("L"), "PPM")
    yield "16 bit.pgm", b"P5 %d %d 65535\n" % (WIDTH, HEIGHT) + np.full((HEIGHT, WIDTH), 30000, ">u2").tobytes()
    yield "upper case.JPG", jpeg


def bad_at_index() -> Iterator[tuple[str, bytes]]:
    """Files whose header says that they are bad."""
    rgb = photo()
    jpeg, plain = encode(rgb, "JPEG", quality=90), encode(rgb, "PNG")
    yield "empty.jpg", b""
    yield "one byte.jpg", b"\xff"
    yield "zeros.jpg", bytes(5000)
    yield "words.jpg", b"This file was moved.\n" * 20
    yield "html.jpg", b"<html><body>404</body></html>"
    yield "gif.jpg", encode(rgb, "GIF")
    yield "avif.jpg", b"\0\0\0\x1cftypavif" + bytes(300)
    yield "start only.jpg", jpeg[:3]
    yield "cut in the header.jpg", jpeg[:100]
    yield "12 bit.jpg", jpeg.replace(b"\xff\xc0\0\x11\x08", b"\xff\xc0\0\x11\x0c", 1)
    yield "no lines.jpg", jpeg.replace(b"\xff\xc0\0\x11\x08" + struct.pack(">H", HEIGHT), b"\xff\xc0\0\x11\x08\0\0", 1)
    yield "cut gzip.jpg", gzip.compress(jpeg)[:300]
    yield "cut in the header.png", plain[:20]
    yield "float.tif", encode(Image.fromarray(np.ones((HEIGHT, WIDTH), np.float32)), "TIFF")
    yield "32 bit.tif", encode(Image.fromarray(np.ones((HEIGHT, WIDTH), np.int32)), "TIFF")
    yield "cut in the header.webp", encode(rgb, "WEBP")[:14]
    yield "cut in the header.bmp", encode(rgb, "BMP")[:20]


def bad_inside() -> Iterator[tuple[str, bytes]]:
    """Files whose header is sound."""
    rgb = photo()
    jpeg, plain = encode(rgb, "JPEG", quality=90), encode(rgb, "PNG")
    yield "half.jpg", jpeg[: len(jpeg) // 2]
    yield "no end.jpg", jpeg[:-2]
    yield "half progressive.jpg", encode(rgb, "JPEG", progressive=True)[:900]
    yield "half with a thumbnail.jpg", jpeg[:2] + segment(0xFE, jpeg) + jpeg[2 : len(jpeg) // 2]
    yield "no end chunk.png", plain[:-12]
    yield "half.png", plain[: len(plain) // 2]
    yield "wrong checksum.png", plain[:60] + bytes([plain[60] ^ 1]) + plain[61:]
    yield "no pixels.png", plain[:33] + chunk(b"IEND", b"")
    yield "half.webp", encode(rgb, "WEBP", quality=90)[:700]
    yield "half.bmp", encode(rgb, "BMP")[:3000]
    yield "half.tif", encode(rgb, "TIFF")[:3000]
    yield "half.ppm", encode(rgb, "PPM")[:3000]
    yield "bomb.png", png(60_000, 60_000, 1, 0, b"\0")
