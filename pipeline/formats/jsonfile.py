"""JSON files of long lists, written entry by entry: a file for a million images is larger than memory allows.

A file is an object whose last values are lists, one entry a line. Lists grow side by side.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import IO, Any

from pipeline.files.storage import Storage


class JsonLists:
    """A JSON file that grows; made by ``JsonFiles``."""

    def __init__(self, parts: Mapping[str, IO[bytes]]) -> None:
        self._parts = parts
        self._counts = dict.fromkeys(parts, 0)

    def add(self, key: str, entry: Any) -> int:
        """Append an entry of plain JSON values to a list.

        Returns:
            Its number in this list, from 1, which serves as an id.
        """
        part = self._parts[key]
        part.write(b",\n" if self._counts[key] else b"\n")
        part.write(encode(entry))
        self._counts[key] += 1
        return self._counts[key]


class JsonFiles:
    """JSON files of one kind, such as one a split; each begins when it is first named.

    All are put in place at the end of the ``with`` block, each of them whole, or none after an exception.

        with JsonFiles(output, {"categories": […]}, ("images", "annotations")) as files:
            files["annotations/instances_train.json"].add("images", {…})

    Args:
        output: where the files go.
        head: values in front of the lists.
        lists: keys of the lists, in order.
    """

    def __init__(self, output: Storage, head: Mapping[str, Any], lists: Sequence[str]) -> None:
        self._output = output
        self._head = head
        self._lists = lists
        self._open: dict[str, JsonLists] = {}
        self._stack = contextlib.ExitStack()

    @property
    def names(self) -> list[str]:
        """Names of all files so far, sorted."""
        return sorted(self._open)

    def __enter__(self) -> JsonFiles:
        """Write nothing yet."""
        return self

    def __exit__(self, *reason: Any) -> None:
        """Put the files in place, unless there was an exception."""
        self._stack.__exit__(*reason)

    def __getitem__(self, name: str) -> JsonLists:
        """The file of this name, relative to the output."""
        if name not in self._open:
            self._open[name] = self._stack.enter_context(self._new(name))
        return self._open[name]

    @contextlib.contextmanager
    def _new(self, name: str) -> Iterator[JsonLists]:
        first, *others = self._lists
        with contextlib.ExitStack() as stack:
            file = stack.enter_context(self._output.new_file(name))
            # Beside the file, as the folder for temporary files is often small. They have no names.
            folder = os.path.dirname(self._output.path(name)) if self._output.is_local else None
            parts = {key: stack.enter_context(tempfile.TemporaryFile(dir=folder)) for key in others}
            file.write(b"{\n")
            for key, value in self._head.items():
                file.write(encode(key) + b": " + encode(value) + b",\n")
            file.write(encode(first) + b": [")
            yield JsonLists({first: file, **parts})
            for key, part in parts.items():
                file.write(b"\n],\n" + encode(key) + b": [")
                part.seek(0)
                shutil.copyfileobj(part, file)
            file.write(b"\n]\n}\n")


def encode(value: Any) -> bytes:
    """A value as JSON in UTF-8, in one line."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
