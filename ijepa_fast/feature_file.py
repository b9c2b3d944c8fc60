"""Features on the disk, a row an image: .npy, .safetensors or .parquet, written row by row and gone on with.

While it is written it is `<out>.partial`, in the final layout (of Parquet: bare rows), with `<out>.partial.csv`, the
path and the class of every row done, and `<out>.partial.json`, what the rows were made with. Memory holds one batch.
"""
import csv
import io
import json
import os
from pathlib import Path
from typing import Any, Self

import numpy as np

from ijepa_fast.data.index import Index
from ijepa_fast.errors import UserError

SUFFIXES = (".npy", ".safetensors", ".parquet")
_SAFETENSORS_HEADER = 1024  # bytes, one length for any number of rows
_ROW_GROUP = 4096  # rows that become Parquet at once
_CSV: dict[str, Any] = {"newline": "", "encoding": "utf-8", "errors": "surrogateescape"}  # a path is bytes


class FeatureFile:
    """One row of `dim` fp32 features for every image of `index`, in `out`. A context manager: `append`, then `finish`.

    `about` says what the rows are made with. Where a partial file lies, its rows stay, and `done` of them are there to
    begin with; `UserError` where they were made with something else or of other images, where `out` exists, and where
    the format is none of ours.
    """

    def __init__(self, out: Path, index: Index, dim: int, about: dict[str, Any]):
        if out.suffix not in SUFFIXES:
            raise UserError(f"--out {out}: features are written as {', '.join(SUFFIXES)}")
        if out.exists():
            raise UserError(f"--out {out} exists already; remove it, or choose another")
        if out.suffix == ".parquet":
            _pyarrow()
        self.out, self.index, self.dim = out, index, dim
        self._rows, self._csv, self._about = (Path(f"{out}.partial{end}") for end in ("", ".csv", ".json"))
        self._header = _header(out.suffix, len(index), dim, about)
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            if self._about.exists():
                self.done = self._go_on(about)
            else:
                self.done = 0
                self._rows.write_bytes(self._header)
                self._csv.write_text("path,class\n")
                self._about.write_text(json.dumps(about))
            self._file = open(self._rows, "r+b")  # noqa: SIM115 (open as long as this object)
            self._list = open(self._csv, "a", **_CSV)  # noqa: SIM115
        except OSError as error:
            raise UserError(f"--out {out} cannot be written: {error.strerror}") from None
        self._file.seek(len(self._header) + self.done * dim * 4)

    def _go_on(self, about: dict[str, Any]) -> int:
        """How many rows are done. A kill may have cut the last line short: what is not in both files does not count."""
        if json.loads(self._about.read_text()) != about:
            raise UserError(f"{self._rows} was begun with other weights or options; remove it, or choose another --out")
        whole = (self._rows.stat().st_size - len(self._header)) // (self.dim * 4)
        checked, done = Path(f"{self._csv}.checked"), 0
        with open(self._csv, **_CSV) as file, open(checked, "w", **_CSV) as kept:
            lines, write = csv.reader(file), csv.writer(kept, lineterminator="\n").writerow
            write(next(lines, ("path", "class")))
            for line in lines:
                if done == whole:
                    break
                if done == len(self.index) or line != self._name(done):
                    if next(lines, None) is None:  # the last line
                        break
                    raise UserError(f"{self._rows} was begun over other images; remove it, or choose another --out")
                write(line)
                done += 1
        os.replace(checked, self._csv)
        with open(self._rows, "r+b") as file:
            file.write(self._header)  # there may be more images by now, or fewer
        return done

    def _name(self, image: int) -> list[str]:
        """[path, class], as the lines of the list give them."""
        label = self.index.records["label"][image]
        return [self.index.path(image), self.index.class_names[label] if label >= 0 else ""]

    def append(self, features: np.ndarray) -> None:
        """Add fp32 `[n, dim]`, the next n rows; a kill after this loses none of them."""
        self._file.write(np.ascontiguousarray(features, "<f4").data)
        self._file.flush()
        done = self.done + len(features)
        csv.writer(self._list, lineterminator="\n").writerows(self._name(i) for i in range(self.done, done))
        self._list.flush()
        self.done = done

    def finish(self) -> None:
        """Give the file its name; and `<out>` with the suffix .csv, a line a row, beside .npy and .safetensors."""
        self.close()
        if self.out.suffix == ".parquet":
            self._write_parquet()
            self._csv.unlink()
            self._rows.unlink()
        else:
            os.replace(self._csv, self.out.with_suffix(".csv"))
            os.replace(self._rows, self.out)
        self._about.unlink()

    def _write_parquet(self) -> None:
        """Columns path, class, features (a list of `dim` floats), a row group at a time."""
        arrow = _pyarrow()
        kind = arrow.list_(arrow.float32(), self.dim)
        schema = arrow.schema([("path", arrow.string()), ("class", arrow.string()), ("features", kind)])
        rows = np.memmap(self._rows, "<f4", "r").reshape(-1, self.dim)
        writing = Path(f"{self.out}.writing")
        with arrow.parquet.ParquetWriter(writing, schema) as writer:
            for first in range(0, len(rows), _ROW_GROUP):
                some = rows[first : first + _ROW_GROUP]
                names = [self._name(first + i) for i in range(len(some))]
                paths, classes = ([_readable(name[column]) for name in names] for column in (0, 1))
                values = arrow.FixedSizeListArray.from_arrays(some.ravel(), self.dim)
                writer.write_table(arrow.table([paths, classes, values], schema=schema))
        os.replace(writing, self.out)

    def close(self) -> None:
        self._file.close()
        self._list.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _header(suffix: str, rows: int, dim: int, about: dict[str, Any]) -> bytes:
    """What comes before the rows; of one length whatever the number of rows."""
    if suffix == ".npy":
        buffer = io.BytesIO()
        shape = {"descr": "<f4", "fortran_order": False, "shape": (rows, dim)}
        np.lib.format.write_array_header_1_0(buffer, shape)  # pads, so that the first axis may grow
        return buffer.getvalue()
    if suffix == ".safetensors":
        tensor = {"dtype": "F32", "shape": [rows, dim], "data_offsets": [0, rows * dim * 4]}
        text = json.dumps({"__metadata__": {k: str(v) for k, v in about.items()}, "features": tensor}).encode()
        size = _SAFETENSORS_HEADER - 8
        return size.to_bytes(8, "little") + text.ljust(size)
    return b""


def _pyarrow() -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError("a .parquet file needs pyarrow: pip install pyarrow, or write .npy or .safetensors") from None
    return pyarrow


def _readable(name: str) -> str:
    return name.encode(errors="surrogateescape").decode(errors="replace")
