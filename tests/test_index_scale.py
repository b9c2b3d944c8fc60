"""The index at a million images: how long it takes, and how much memory a row takes."""
import json
import subprocess
import sys
import tarfile

import numpy as np
import odd_images
import pytest

MEMBERS, TARS = 1_000_000, 20

# Alone in a process: its CPU seconds, and its peak of memory over what the imports and an index of one image took.
SCRIPT = """if True:
    import json, re, sys, time
    from ijepa_fast.data.index import build_index
    # Not getrusage's: that is at least what the parent of a process held.
    peak = lambda: 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
    build_index(sys.argv[1] + '/one', cache_dir=sys.argv[2], threads=2)
    before, begin, cpu = peak(), time.perf_counter(), time.process_time()
    index = build_index(sys.argv[1] + '/all', cache_dir=sys.argv[2], threads=2)
    built = time.process_time() - cpu, time.perf_counter() - begin, peak() - before
    cpu = time.process_time()
    again = build_index(sys.argv[1] + '/all', cache_dir=sys.argv[2])
    opened = time.process_time() - cpu
    assert again.fingerprint() == index.fingerprint() and not index.about['bad'] and not index.about['faults']
    ends = [index.path(0), index.path(len(index) - 1)]
    print(json.dumps([len(index), len(index.class_names), ends, *built, opened]))
"""


def write_members(path, first, count):
    """A tar of PNGs of one pixel, named by 8 digits: the first over and over, its name and its checksum changed."""
    data = odd_images.encode(odd_images.photo().resize((1, 1)), "PNG")
    info = tarfile.TarInfo("00000000.png")
    info.size = len(data)
    block = np.frombuffer(info.tobuf(tarfile.USTAR_FORMAT) + data + bytes(-len(data) % 512), np.uint8)
    digits = np.array([*range(first, first + count)])[:, None] // 10 ** np.arange(7, -1, -1) % 10
    members = np.tile(block, (count, 1))
    members[:, :8] += digits.astype(np.uint8)
    sums = int(block[148:154].tobytes(), 8) + digits.sum(1)
    members[:, 148:154] = sums[:, None] // 8 ** np.arange(5, -1, -1) % 8 + ord("0")
    with open(path, "wb") as file:
        file.write(members.data)
        file.write(bytes(1024))


@pytest.mark.slow
def test_a_million_members(tmp_path):
    for folder in ("one", "all"):
        (tmp_path / folder).mkdir()
    write_members(tmp_path / "one" / "a.tar", 0, 1)
    for n in range(TARS):
        write_members(tmp_path / "all" / f"n{n:02}.tar", n * MEMBERS // TARS, MEMBERS // TARS)
    with tarfile.open(tmp_path / "all" / "n01.tar") as tar:  # they are tars indeed
        assert [tar.next().name for _ in range(12)][-1] == f"{MEMBERS // TARS + 11:08}.png"
    words = [sys.executable, "-c", SCRIPT, tmp_path, tmp_path / "cache"]
    done = subprocess.run(words, check=True, capture_output=True, text=True)
    images, classes, ends, cpu_s, wall_s, peak, again_s = json.loads(done.stdout)
    print(f"{cpu_s:.1f} CPU-s, {wall_s:.1f} s, {peak / images:.0f} bytes a row; opened in {again_s:.3f} CPU-s")
    assert (images, classes) == (MEMBERS, TARS)
    assert [end.rpartition("/")[2] for end in ends] == ["n00.tar: 00000000.png", f"n19.tar: {MEMBERS - 1:08}.png"]
    assert cpu_s < 60  # and not the time by the clock, of which other work may take its share
    # A row is 29 bytes: twice while the parts are joined, once more where a part is packed, and half again to spare.
    assert peak < 29 * 4.5 * MEMBERS
    assert again_s < 0.1  # it reads the times of the tars, and no row
