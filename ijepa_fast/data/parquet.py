"""Images in a column of a parquet file, as Hugging Face ships data sets: struct {bytes, path}, or plain binary.

A row can only be read with its whole row group, so the groups read last are kept, up to a bound.
"""
import collections
import json
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np

from ijepa_fast.data.storage import LocalStorage, RangeFile, RemoteStorage

_IMAGE_NAMES = ("image", "img", "jpg", "jpeg", "png", "picture")
_LABEL_NAMES = ("label", "labels", "cls", "class", "fine_label")
_KEPT_BYTES = 1 << 28


class ParquetFault(Exception):
    """The file cannot be read, or holds no images."""


def _open(source: str | RangeFile) -> tuple[Any, str, str | None, list[str] | None]:
    """The file, its image column, its label column, and the names of its classes."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise ParquetFault("reading it needs pyarrow (the extra `parquet`)") from None
    try:
        file = pq.ParquetFile(source)
    except (pa.ArrowException, OSError) as error:
        raise ParquetFault(f"it is no readable parquet file: {' '.join(str(error).split())}") from None
    schema, images = file.schema_arrow, []
    for column in schema:
        struct = pa.types.is_struct(column.type) and any(column.type.field(i).name == "bytes"
                                                         for i in range(column.type.num_fields))  # fmt: skip
        if struct or pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type):
            images.append(column.name)
    chosen = next((name for name in _IMAGE_NAMES if name in images), images[0] if images else None)
    if chosen is None:
        raise ParquetFault("it has no column of images (binary, or a struct with `bytes`)")
    label = next((name for name in _LABEL_NAMES if name in schema.names), None)
    names = None
    if label is not None and (described := (schema.metadata or {}).get(b"huggingface")):
        feature = json.loads(described).get("info", {}).get("features", {}).get(label, {})
        names = feature.get("names") if isinstance(feature, dict) else None
    return file, chosen, label, names


def images(source: str | RangeFile) -> Iterator[tuple[bytes | None, str | None]]:
    """The encoded bytes and the class name of each row of a file."""
    import pyarrow as pa

    file, image, label, names = _open(source)
    columns = [image] if label is None else [image, label]
    try:
        for batch in file.iter_batches(batch_size=64, columns=columns):
            labels = batch.column(label).to_pylist() if label is not None else [None] * batch.num_rows
            for data, value in zip(_bytes(batch.column(image)), labels, strict=True):
                if names is not None and isinstance(value, int) and 0 <= value < len(names):
                    value = names[value]
                yield data, None if value is None else str(value)
    except (pa.ArrowException, OSError) as error:
        raise ParquetFault(f"it is damaged: {' '.join(str(error).split())}") from None


def _bytes(column: Any) -> Iterator[bytes | None]:
    import pyarrow as pa

    if pa.types.is_struct(column.type):
        column = column.field("bytes")
    return (value.as_py() for value in column)


class ParquetReader:
    """Reads single rows; the row groups read last are kept. May be called from any thread."""

    def __init__(self, files: LocalStorage | RemoteStorage):
        self._storage = files
        self._lock = threading.Lock()
        self._files: dict[str, tuple[Any, str, np.ndarray]] = {}
        self._groups: collections.OrderedDict[tuple[str, int], Any] = collections.OrderedDict()

    def read(self, path: str, row: int) -> bytes:
        """The bytes of a row. Raises `ParquetFault`."""
        import pyarrow as pa

        with self._lock:
            try:
                if path not in self._files:
                    file, image, _, _ = _open(self._storage.for_pyarrow(path))
                    sizes = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
                    self._files[path] = file, image, np.cumsum([0, *sizes])
                file, image, starts = self._files[path]
                group = int(np.searchsorted(starts, row, "right")) - 1
                if group >= file.num_row_groups:
                    raise ParquetFault(f"it has {starts[-1]} rows now")
                key = path, group
                if key not in self._groups:
                    column = file.read_row_group(group, columns=[image]).column(image).combine_chunks()
                    self._groups[key] = column.field("bytes") if pa.types.is_struct(column.type) else column
                    while len(self._groups) > 1 and sum(c.nbytes for c in self._groups.values()) > _KEPT_BYTES:
                        self._groups.popitem(last=False)
                self._groups.move_to_end(key)
                return self._groups[key][row - int(starts[group])].as_py() or b""
            except pa.ArrowException as error:
                raise ParquetFault(f"it cannot be read any more: {' '.join(str(error).split())}") from None
