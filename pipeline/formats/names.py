"""Names of images within an export, made from their addresses: safe on every disk, unique, always the same.

A name is the part of the address below the common folder of all images, without its suffix. Each of its
components is made harmless: it can neither leave the export, nor be a device of Windows, a hidden file or too
long. Images whose names differ only in their suffix, in case or in the form of their letters all get their id
behind the name, so that a name does not depend on the order of the images.

If images are added to an export, those that are there keep their names: what is added is a new generation.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from array import array
from collections.abc import Iterable
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import takewhile
from pathlib import PurePosixPath

import numpy as np
import numpy.typing as npt

from models.errors import WrongUse
from pipeline.corpus.sources.found import IMAGE_EXTENSIONS
from pipeline.files.storage import is_remote

Keys = npt.NDArray[np.int64]
Components = tuple[str, ...]

LONGEST_COMPONENT = 120
"""Bytes. Disks take 255; formats add suffixes, and a file that is being written has a longer name."""
LONGEST_NAME = 600
"""Bytes. S3 takes 1,024 for a whole key, macOS for a whole path."""
DEFAULT_SUFFIX = ".jpg"
"""Of images whose address has none."""

_RESERVED = re.compile(r"(con|prn|aux|nul|conin\$|conout\$|(com|lpt)[0-9¹²³])(?=\.|$)", re.IGNORECASE)
_FORBIDDEN = frozenset('<>:"|?*\\/')
_INVISIBLE = frozenset(("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"))
_NUMBERED = re.compile(r"-[0-9a-f]{16}$", re.IGNORECASE)
_LIKE_A_FILE = re.compile(r"\.[A-Za-z][A-Za-z0-9]{0,5}$")


@dataclass(frozen=True)
class Naming:
    """How the images of a generation are named.

    Attributes:
        root: components of the folder that the first images of the export have in common.
        shared: keys of names that other images would have as well, sorted int64 (n,).
    """

    root: Components = ()
    shared: Keys = field(default_factory=lambda: np.empty(0, np.int64))

    def name(self, uri: str, row_id: int) -> str:
        """The name of an image; see ``Sample.name``."""
        whole = components(uri)
        inside = whole[: len(self.root)] == self.root and len(whole) > len(self.root)
        parts = whole[len(self.root) :] if inside else whole
        name = "/".join(parts)
        long = len(name.encode()) > LONGEST_NAME
        # A name that looks as if it had an id gets one too, so that those with an id have no others.
        if long or not inside or _NUMBERED.search(name) or self._is_shared(whole):
            return f"{parts[-1] if long else name}-{row_id % 2**64:016x}"
        return name

    def _is_shared(self, whole: Components) -> bool:
        if not len(self.shared):
            return False
        wanted = _key(whole)
        at = int(np.searchsorted(self.shared, wanted))
        return at < len(self.shared) and int(self.shared[at]) == wanted


class NamesSeen:
    """Looks at all addresses once, with eight bytes an image, and finds which names are shared.

    Args:
        root: see ``Naming``; None to find it.
    """

    def __init__(self, root: Components | None) -> None:
        self._root = root
        self._found: Components | None = None
        self._generations: list[array[int]] = []

    def add(self, generation: int, uris: Iterable[str]) -> None:
        """Add images; generations come one after the other."""
        while len(self._generations) <= generation:
            self._generations.append(array("q"))
        keys = self._generations[generation]
        for uri in uris:
            parts = components(uri)
            keys.append(_key(parts))
            if self._root is None and generation == 0:
                folder = parts[:-1]
                self._found = folder if self._found is None else _common(self._found, folder)

    def namings(self) -> list[Naming]:
        """How the images of each generation are named."""
        root = self._root if self._root is not None else self._found or ()
        earlier = np.empty(0, np.int64)
        made = []
        for keys in self._generations:
            found, counts = np.unique(np.frombuffer(keys, np.int64), return_counts=True)
            made.append(Naming(root, found[(counts > 1) | np.isin(found, earlier)]))
            earlier = np.union1d(earlier, found)
        return made


def _common(one: Components, other: Components) -> Components:
    same = (a == b for a, b in zip(one, other, strict=False))
    return one[: sum(takewhile(bool, same))]


def _key(parts: Components) -> int:
    """64 bits of a name, the same for all spellings that some disk takes for one."""
    name = unicodedata.normalize("NFD", "/".join(parts))
    folded = unicodedata.normalize("NFD", name.casefold())
    return int.from_bytes(blake2b(folded.encode(), digest_size=8).digest(), "little", signed=True)


def components(uri: str) -> Components:
    """The folders of an address and the file's name without the suffix of an image, all of them safe."""
    *folders, file = _split(uri)
    stem = file[: len(file) - len(_suffix(file))]
    # A folder must not have the name of a file that a format writes for another image.
    made = [f"{name}_" if _LIKE_A_FILE.search(name) else name for name in map(safe, folders)]
    return (*made, safe(stem))


def suffix_of(uri: str, default: str = DEFAULT_SUFFIX) -> str:
    """The suffix of an image's file, in lower case; ``default`` if the address has none."""
    return _suffix(_split(uri)[-1]).lower() or default


def _split(uri: str) -> list[str]:
    rest = uri.partition("://")[2] if is_remote(uri) else uri
    if uri.startswith(("http://", "https://")):
        rest = re.split(r"[?#]", rest, maxsplit=1)[0]
    return [part for part in rest.split("/") if part not in ("", ".")] or ["_"]


def _suffix(file: str) -> str:
    suffix = PurePosixPath(file).suffix
    return suffix if suffix.lower() in IMAGE_EXTENSIONS else ""


@functools.lru_cache(maxsize=1024)  # folders have many images
def safe(component: str) -> str:
    """A component of a path that every disk takes and no program misunderstands.

    >>> safe(".."), safe("a:b"), safe("NUL"), safe(".git")
    ('_', 'a_b', '_NUL', '_git')
    """
    text = unicodedata.normalize("NFC", component)
    text = "".join(
        "_" if char in _FORBIDDEN or unicodedata.category(char) in _INVISIBLE else char for char in text
    )
    text = text.strip(" ").rstrip(". ")  # Windows drops them
    if text.startswith((".", "-")):  # hidden, or an option of a program
        text = f"_{text[1:]}"
    if _RESERVED.match(text):
        text = f"_{text}"
    data = text.encode()
    if len(data) > LONGEST_COMPONENT:
        digest = blake2b(component.encode("utf-8", "surrogatepass"), digest_size=4).hexdigest()
        text = f"{data[: LONGEST_COMPONENT - 9].decode(errors='ignore').rstrip('. ')}-{digest}"
    return text or "_"


def refuse_outside(path: str, where: str) -> str:
    """A path that a file of a dataset names, if it stays within the dataset.

    Raises:
        MaskMillError: ``dataset_invalid``.
    """
    pure = PurePosixPath(path)
    if not path or pure.is_absolute() or ".." in pure.parts or "\0" in path:
        raise WrongUse(
            "dataset_invalid",
            f"{where} names the file {path!r}, which is not in the dataset.",
            "Correct the file: its paths are relative to the dataset.",
        )
    return path
