"""Rows that are in Python's memory, as files that the native part reads."""

from __future__ import annotations

import io
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, TypeAlias, cast

from . import _vlmq

Row: TypeAlias = Mapping[str, Any]
"""`messages` (chat messages with image parts), `conversations` (LLaVA's), `question` and `answer`, or
nothing of these but `text`; images in `image` or `images`, or in the image parts of messages. An image is
a PIL image, a path, or what `datasets` makes of one that is not decoded, `{"bytes": …, "path": …}`."""

Data: TypeAlias = str | os.PathLike[str] | Iterable[Row]
"""A file or folder, or rows: a list, or a data set of `datasets`."""

DEFAULT_SAMPLES = 128
"""As on the command line."""

_KEYS = ["id", "index", "question_id", "category", "conversations", "messages", "text", "question", "query",
         "hint", *"ABCDEFGH", "answer", "answers"]
_IMAGE_KEYS = ["image", "images"]
_PART_KEYS = ["image", "url", "path", "image_url"]
# What PNG holds; anything else is turned into RGB first.
_PNG_MODES = {"1", "L", "LA", "P", "RGB", "RGBA", "I;16"}


@contextmanager
def samples_file(data: Data, samples: int | None, seed: int, takes_more: bool
                 ) -> Iterator[tuple[str, int]]:
    """A file with the rows that a run takes, and how many it takes. Of a list, or of anything else with
    a length, only those are written, the same as of a file of all rows; of what can only be gone through,
    the first. `takes_more`: the run takes others as well, so that all are written.
    """
    if isinstance(data, (str, os.PathLike)):
        yield os.fspath(data), DEFAULT_SAMPLES if samples is None else samples
        return
    if isinstance(data, Mapping):
        raise TypeError("calibration: a path or rows expected, a mapping found")
    rows = _rows(data, DEFAULT_SAMPLES if samples is None else samples)
    n = min(DEFAULT_SAMPLES, len(rows)) if samples is None else samples
    chosen = set(_vlmq.choose(len(rows), n, seed))
    if takes_more or n > len(rows):
        chosen = set(range(len(rows)))
    with tempfile.TemporaryDirectory(prefix="vlmq-") as folder:
        yield _write(Path(folder, "samples.jsonl"), rows, chosen), n


@contextmanager
def task_files(tasks: Data | Sequence[str | os.PathLike[str]] | Mapping[str, Data]) -> Iterator[list[str]]:
    """The tasks as the command line has them: a path, several, or by name; a name that is no
    benchmark's is that of a task in memory."""
    if isinstance(tasks, (str, os.PathLike)):
        yield [os.fspath(tasks)]
        return
    with tempfile.TemporaryDirectory(prefix="vlmq-") as folder:
        if isinstance(tasks, Mapping):
            yield [_named(folder, name, task) for name, task in tasks.items()]
            return
        rows = _rows(tasks)
        paths = [os.fspath(rows[i]) for i in range(len(rows)) if isinstance(rows[i], (str, os.PathLike))]
        yield paths if len(paths) == len(rows) else [_named(folder, "task", rows)]


class _Rows(Protocol):
    """Rows that can be counted and asked for by number."""

    def __len__(self) -> int: ...

    def __getitem__(self, number: int, /) -> Any: ...


def _rows(data: Iterable[Any] | _Rows, limit: int | None = None) -> _Rows:
    """The rows, those that can only be gone through up to a limit."""
    if hasattr(data, "__len__") and hasattr(data, "__getitem__"):
        return cast(_Rows, data)
    return list(islice(data, limit))


def _named(folder: str, name: str, task: Data | _Rows) -> str:
    if isinstance(task, (str, os.PathLike)):
        return f"{name}={os.fspath(task)}"
    if not name or name in {".", ".."} or "/" in name or "\\" in name:
        raise ValueError(f"{name!r} is no name for a task")
    rows = _rows(task)
    return _write(Path(folder, f"{name}.jsonl"), rows, set(range(len(rows))))


def _write(path: Path, rows: _Rows, chosen: set[int]) -> str:
    """The chosen rows in the lines of their own numbers, so that errors tell these: the first row is
    line 1."""
    with path.open("w", encoding="utf-8") as file:
        for number in range(len(rows)):
            if number in chosen:
                row = _row(rows[number], number, path.parent)
                file.write(json.dumps(row, ensure_ascii=False))
            file.write("\n")
    return str(path)


def _row(row: Any, number: int, folder: Path) -> dict[str, Any]:
    if not isinstance(row, Mapping):
        raise TypeError(f"row {number}: a mapping expected, {type(row).__name__} found")
    images = _Images(folder, number)
    written = {key: row[key] for key in _KEYS if row.get(key) is not None}
    if "messages" in written:
        written["messages"] = [_message(message, images) for message in written["messages"]]
    for key in _IMAGE_KEYS:
        value = row.get(key)
        if value is not None:
            values = value if isinstance(value, (list, tuple)) else [value]
            written[key] = [images.add(value) for value in values]
            break
    try:
        json.dumps(written)
    except TypeError as wrong:
        raise TypeError(f"row {number}: {wrong}") from None
    return written


def _message(message: Any, images: _Images) -> Any:
    """A chat message, the images of its parts written to files."""
    if not isinstance(message, Mapping):
        return message
    content = message.get("content")
    if isinstance(content, (list, tuple)):
        content = [_part(part, images) for part in content]
    return {"role": message.get("role"), "content": content}


def _part(part: Any, images: _Images) -> Any:
    if not isinstance(part, Mapping):
        return part
    kept = {key: part[key] for key in ("type", "text") if part.get(key) is not None}
    for key in _PART_KEYS:
        value = part.get(key)
        value = value.get("url") if key == "image_url" and isinstance(value, Mapping) else value
        if value is not None and kept.get("type") != "text":
            kept["image"] = images.add(value)
            break
    return kept


class _Images:
    """The image files of one row."""

    def __init__(self, folder: Path, number: int) -> None:
        self._folder = folder
        self._number = number
        self._n = 0

    def add(self, image: Any) -> str:
        """Writes an image; returns its name. The reader tells formats by content."""
        if isinstance(image, str) and image.startswith(("http://", "https://", "data:")):
            return image
        name = f"row-{self._number}-image-{self._n}"
        self._n += 1
        (self._folder / name).write_bytes(self._encoded(image))
        return name

    def _encoded(self, image: Any) -> bytes:
        if isinstance(image, bytes):
            return image
        if isinstance(image, Mapping) and (image.get("bytes") or image.get("path")):
            return image["bytes"] or Path(image["path"]).read_bytes()
        if isinstance(image, (str, os.PathLike)):
            return Path(image).read_bytes()
        if not (hasattr(image, "save") and hasattr(image, "mode")):
            raise TypeError(f"row {self._number}: an image expected (of PIL, a path, or bytes), "
                            f"{type(image).__name__} found")
        buffer = io.BytesIO()
        # Level 1: the file lives as long as it takes to read it.
        image = image if image.mode in _PNG_MODES else image.convert("RGB")
        image.save(buffer, format="PNG", compress_level=1)
        return buffer.getvalue()
