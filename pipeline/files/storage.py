"""Where outputs live: a local folder, ``s3://bucket/prefix``, or any other place that fsspec reaches.

Paths inside a storage are relative POSIX paths (``labels/part-0.parquet``); "" is its root.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, TYPE_CHECKING, Any
from urllib.parse import unquote

import fsspec
import platformdirs

from models.errors import Damaged, FailedWork, MaskMillError, WrongUse
from models.files import new_file, staged_file, write_file, write_unsynced
from pipeline.files.faults import unreachable
from pipeline.files.redaction import MASK, redact, without_signature
from pipeline.files.s3 import arrow_s3, driver_options

if TYPE_CHECKING:
    from pyarrow.fs import FileSystem

_SCHEME_ALIASES = {"s3a": "s3", "s3n": "s3", "gcs": "gs"}
_MISSING: Any = object()

Names = list[str]  # inside the class, "list" is a method


def canonical_uri(uri: str | os.PathLike[str]) -> str:
    """One spelling for each place.

    Local places become absolute POSIX paths without ``file://``; ``.`` and ``..`` are resolved as text, and a
    leading ``~`` is the home folder, which a shell leaves to the program in ``--output=~/table``.
    Symbolic links and Unicode normalisation forms are left alone, since the path must still open the same
    file. Remote places keep their key as it is, after a lower-case scheme with one name per service (``s3a``
    is ``s3``) and a lower-case host.

    Raises:
        MaskMillError: ``wrong_use``; the message does not repeat it.

    >>> canonical_uri("/data/./photos/../cat.jpg")
    '/data/cat.jpg'
    >>> canonical_uri("S3://bucket/a//b.jpg")
    's3://bucket/a//b.jpg'
    """
    text = os.fspath(uri)
    if text[:5].lower() == "file:":
        text = unquote(text[5:])
        text = text.removeprefix("//localhost") if text.startswith("//localhost/") else text
        return _absolute("/" + text)
    scheme, found, rest = text.partition("://")
    if not found or not scheme.replace("+", "").replace("-", "").replace(".", "").isalnum():
        # Not "~name", which is an ordinary name of a file far more often than somebody's home.
        return _absolute(os.path.expanduser(text) if text == "~" or text.startswith("~/") else text)
    scheme = scheme.lower()
    if scheme == "memory":
        return f"memory://{rest.lstrip('/')}"
    if _names_user(scheme, rest):
        where = without_signature(f"{scheme}://{rest.rpartition('@')[2] if '@' in rest else '…'}")
        raise WrongUse(
            "wrong_use",
            f"An address holds a user name or a password: {where.replace('://', f'://{MASK}@', 1)}",
            "Leave it out: addresses are stored with the labels. S3 reads AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY or a profile; other storages read FSSPEC_SCHEME_NAME, such as "
            "FSSPEC_SFTP_PASSWORD.",
        )
    host = re.match(r"[^/?#]*", rest)
    assert host is not None, "it may be empty"
    user, at, name = host[0].rpartition("@")
    return f"{_SCHEME_ALIASES.get(scheme, scheme)}://{user}{at}{name.lower()}{rest[host.end() :]}"


def _names_user(scheme: str, rest: str) -> bool:
    """Whether an address (after ``://``) has user information that may be a secret."""
    host = re.split(r"[/?#]", rest, maxsplit=1)[0]
    user, at, name = host.rpartition("@")
    if at:
        # abfss://container@account and sftp://user@host are no secrets; a lone token before a web host is.
        return ":" in user or scheme in ("http", "https")
    # A "/" in a password, as AWS's keys have, seems to end the host: what follows its ":" is no port.
    _, colon, port = name.rpartition(":")
    return bool(colon) and not port.isdigit() and not name.startswith(("[", "arn:"))


def placed_beside(folder: str | os.PathLike[str], place: str) -> str:
    """The canonical URI of a place that a file in a folder names: there its relative paths begin.

    >>> placed_beside("/etc/pets", "photos/")
    '/etc/pets/photos'
    >>> placed_beside("/etc/pets", "s3://bucket/photos")
    's3://bucket/photos'

    Raises:
        MaskMillError: ``wrong_use``.
    """
    text = os.path.expanduser(place)
    relative = "://" not in text and not text.lower().startswith("file:")
    return canonical_uri(os.path.join(folder, text) if relative else text)


def refuse_secrets(uri: str) -> None:
    """Refuse an address that is stored as it is, if it holds a password or a signature.

    Raises:
        MaskMillError: ``wrong_use``.
    """
    place = canonical_uri(uri)
    public = without_signature(place)
    if public != place:
        raise WrongUse(
            "wrong_use",
            f"The address {public} holds a signature or a token, and would be stored with it.",
            "Save the file and give its path, or give an address that needs no signature.",
        )


def _absolute(path: str) -> str:
    # POSIX lets two leading slashes mean something else than one; Linux and macOS do not.
    path = os.path.abspath(path)
    return "/" + path.lstrip("/") if path.startswith("//") else path


def cache_dir() -> Path:
    """This user's cache: ``$MASKMILL_CACHE``, else where the platform has it (``~/.cache/maskmill``)."""
    own = os.environ.get("MASKMILL_CACHE")
    return Path(own) if own else platformdirs.user_cache_path("maskmill", appauthor=False)


def is_remote(uri: str) -> bool:
    """Whether a canonical URI is anything else than a local path."""
    return "://" in uri


@dataclass(frozen=True)
class Storage:
    """A folder, here or elsewhere.

    Attributes:
        uri: canonical URI of the root.
        fs: the fsspec file system.
        root: path of the root within ``fs``.
    """

    uri: str
    fs: fsspec.AbstractFileSystem
    root: str

    @property
    def is_local(self) -> bool:
        """Whether the root is a path of this machine."""
        return not is_remote(self.uri)

    def path(self, name: str = "") -> str:
        """Path within ``fs`` (and within ``arrow_filesystem()``) of a relative name."""
        if not name:
            return self.root
        if not {"", ".", ".."}.isdisjoint(name.split("/")):  # few have: pathlib takes its time
            pure = PurePosixPath(name)
            if not pure.parts or pure.is_absolute() or ".." in pure.parts:
                raise ValueError(f"not a name inside the storage: {name}")
            name = str(pure)
        return f"{self.root.rstrip('/')}/{name}"

    def uri_of(self, name: str = "") -> str:
        """Canonical URI of a relative name."""
        self.path(name)
        return f"{self.uri.rstrip('/')}/{PurePosixPath(name)}" if name else self.uri

    def child(self, name: str) -> Storage:
        """The storage rooted at a folder of this one."""
        return Storage(self.uri_of(name), self.fs, self.path(name))

    def exists(self, name: str = "") -> bool:
        """Whether there is a file, or a folder with something in it."""
        with storage_errors(self.uri_of(name)):
            return bool(self.fs.exists(self.path(name)))

    def list(self, name: str = "", *, recursive: bool = False) -> Names:
        """Sorted relative names of the files in a folder; none if there is no such folder."""
        with storage_errors(self.uri_of(name)):
            try:
                found = self.fs.find(self.path(name), maxdepth=None if recursive else 1)
            except FileNotFoundError:
                return []
        return self._relative(path for path in found if path != self.path(name))

    def glob(self, pattern: str) -> Names:
        """Sorted relative names of the files and folders that match (``*``, ``?``, ``[]``, ``**``)."""
        with storage_errors(self.uri_of(pattern)):
            return self._relative(self.fs.glob(self.path(pattern)))

    def _relative(self, paths: Iterable[str]) -> Names:
        start = len(self.root.rstrip("/")) + 1
        # Object stores have no folders: consoles put an empty object "name/" in the place of one.
        return sorted(str(path)[start:] for path in paths if not str(path).endswith("/"))

    def delete(self, name: str = "") -> None:
        """Remove a file, or a folder with all that is in it; nothing happens if it is not there."""
        with storage_errors(self.uri_of(name)), contextlib.suppress(FileNotFoundError):
            self.fs.rm(self.path(name), recursive=True)

    def read_bytes(self, name: str) -> bytes:
        """Content of a file.

        Raises:
            FileNotFoundError: there is none.
        """
        with storage_errors(self.uri_of(name)):
            return bytes(self.fs.cat_file(self.path(name)))

    def write_bytes(self, name: str, data: bytes) -> None:
        """Put a file in place whole: a reader sees the old content or the new, never a part."""
        with storage_errors(self.uri_of(name)):
            if self.is_local:
                write_file(Path(self.path(name)), data)
            else:
                self._put(name, data, "overwrite")

    def write_unsynced(self, files: Sequence[tuple[str, bytes]]) -> None:
        """Put files in place as ``write_bytes`` does, but without making sure of a disk.

        See ``models.files.write_unsynced``. An object store has what it has said to have.
        """
        if not self.is_local:
            for name, data in files:
                self.write_bytes(name, data)
            return
        with storage_errors(self.uri):
            write_unsynced([(self.path(name), data) for name, data in files])

    @contextlib.contextmanager
    def new_file(self, name: str) -> Iterator[IO[bytes]]:
        """A file to be written piece by piece, for what is too large to be held.

        It is put in place whole when the block ends, over any that is there. After an exception nothing of it
        remains. Remote files are gathered in the folder for temporary files first.
        """
        with contextlib.ExitStack() as stack:
            if self.is_local:
                with storage_errors(self.uri_of(name)):
                    file = stack.enter_context(new_file(Path(self.path(name))))
                yield file
            else:
                file = stack.enter_context(tempfile.NamedTemporaryFile(prefix="maskmill-"))
                yield file
                file.flush()
                with storage_errors(self.uri_of(name)):
                    self._send(name, lambda path: self.fs.put_file(file.name, path))

    @contextlib.contextmanager
    def open_file(self, name: str) -> Iterator[IO[bytes]]:
        """A file to be read piece by piece.

        Raises:
            FileNotFoundError: there is none.
        """
        with storage_errors(self.uri_of(name)):
            file = self.fs.open(self.path(name), "rb")
        with file:
            yield file

    def create_bytes(self, name: str, data: bytes) -> bool:
        """Put a file in place only if there is none; of several that try at once, one succeeds.

        Returns:
            Whether this call made the file.
        """
        with storage_errors(self.uri_of(name)):
            try:
                if self.is_local:
                    with staged_file(Path(self.path(name)), data) as temporary:
                        os.link(temporary, self.path(name))
                else:
                    self._put(name, data, "create")
            except FileExistsError:
                return False
            return True

    def swap_bytes(self, name: str, old: bytes, new: bytes | None) -> bool:
        """Compare and swap: replace a file, or delete it, only if it holds ``old``.

        Of several that try at once, one succeeds: by a lock on this machine's disks and network drives, by
        conditional requests on S3. Elsewhere there is a moment between comparing and replacing.

        Args:
            name: relative name.
            old: content that the file must have.
            new: its new content, which no one else writes; None deletes it.

        Returns:
            Whether this call did it.
        """
        with storage_errors(self.uri_of(name)):
            if self.is_local:
                return self._swap_local(Path(self.path(name)), old, new)
            if self.uri.startswith("s3://"):
                return self._swap_s3(name, old, new)
            if self._content(name) != old:
                return False
            if new is None:
                self.fs.rm_file(self.path(name))
            else:
                self._put(name, new, "overwrite")
            return True

    def _content(self, name: str) -> bytes | None:
        try:
            return bytes(self.fs.cat_file(self.path(name)))
        except FileNotFoundError:
            return None

    @staticmethod
    def _swap_local(path: Path, old: bytes, new: bytes | None) -> bool:
        try:
            file = path.open("r+b")
        except FileNotFoundError:
            return False
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX)  # until the file is closed
            except OSError as error:
                if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                    raise
            # Whoever had the lock before may have put another file here.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file.fileno()), path.stat()) and file.read() == old:
                    if new is None:
                        path.unlink()
                    else:
                        write_file(path, new)
                    return True
            return False

    def _swap_s3(self, name: str, old: bytes, new: bytes | None) -> bool:
        try:
            etag = self.fs.info(self.path(name))["ETag"]
        except FileNotFoundError:
            return False
        if self._content(name) != old:
            return False
        try:
            if new is None:
                bucket, _, key = self.path(name).partition("/")
                self.fs.call_s3("delete_object", Bucket=bucket, Key=key, IfMatch=etag)
            else:
                self.fs.pipe_file(self.path(name), new, IfMatch=etag)
        except OSError as error:
            answer = getattr(error.__cause__, "response", {}).get("Error", {}).get("Code")
            if answer not in ("PreconditionFailed", "ConditionalRequestConflict", "NoSuchKey", "412", "409"):
                raise
            # An answer can be lost, and the request be sent again: then it fails because it succeeded.
            return self._content(name) == new
        return True

    def move(self, name: str, to: str) -> None:
        """Move a file within this storage, over any that is there. Atomic on local disks."""
        with storage_errors(self.uri_of(name)):
            if self.is_local:
                Path(self.path(to)).parent.mkdir(parents=True, exist_ok=True)
                os.replace(self.path(name), self.path(to))
            else:
                self.fs.mv(self.path(name), self.path(to))

    def _put(self, name: str, data: bytes, mode: str) -> None:
        self._send(name, lambda path: self.fs.pipe_file(path, data, mode=mode))

    def _send(self, name: str, send: Callable[[str], object]) -> None:
        try:
            send(self.path(name))
        except FileNotFoundError as error:
            raise WrongUse(
                "wrong_use",
                f"cannot write {self.uri_of(name)}: {error}",
                "Create the bucket first, or correct its name.",
            ) from error

    def read_json(self, name: str, default: Any = _MISSING) -> Any:
        """Value of a JSON file.

        Args:
            name: relative name.
            default: returned if there is no such file.

        Raises:
            FileNotFoundError: no such file and no default.
            MaskMillError: ``document_invalid``.
        """
        try:
            data = self.read_bytes(name)
        except FileNotFoundError:
            if default is _MISSING:
                raise
            return default
        try:
            return json.loads(data)
        except ValueError as error:
            raise Damaged(
                "document_invalid",
                f"{self.uri_of(name)} is not valid JSON: {error}",
                "Restore the file, or remove it if what it describes can be made again.",
            ) from None

    def write_json(self, name: str, value: Any) -> None:
        """Put a JSON file (UTF-8, indented, keys in the order given) in place whole."""
        text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
        self.write_bytes(name, text.encode() + b"\n")

    def arrow_filesystem(self) -> FileSystem:
        """The same file system for pyarrow and Ray, to be used with ``path()``.

        S3 gets Arrow's own client, which reads and writes without the interpreter lock; the endpoint is
        that of AWS_ENDPOINT_URL_S3 or AWS_ENDPOINT_URL, as for fsspec. Requests that are paid for
        (``pipeline.files.s3``) are left to fsspec.
        """
        from pyarrow import fs as arrow

        if self.is_local:
            return arrow.LocalFileSystem()
        if self.uri.startswith("s3://") and not self.fs.req_kw:
            return arrow_s3(self.root.partition("/")[0], anonymous=self.fs.anon)
        return arrow.PyFileSystem(arrow.FSSpecHandler(self.fs))


def open_storage(uri: str | os.PathLike[str]) -> Storage:
    """Storage at a path or URI; nothing is created or contacted.

    Raises:
        MaskMillError: ``wrong_use`` for a scheme that fsspec does not know or whose package
            is missing.
    """
    place = canonical_uri(uri)
    if not is_remote(place):
        return Storage(place, fsspec.filesystem("file", auto_mkdir=True), place)
    scheme = place.partition("://")[0]
    try:
        # Listings must be fresh: other processes write to the same place.
        fs = fsspec.filesystem(scheme, use_listings_cache=False, **driver_options(place))
    except Exception as error:  # unknown scheme, missing package, missing options: each driver has its own
        raise WrongUse(
            "wrong_use",
            f"cannot reach {redact(place)}: {redact(str(error))}",
            "Use a local path, s3://bucket/prefix, or install the fsspec package of that scheme.",
        ) from None
    return Storage(place.rstrip("/"), fs, str(fsspec.core.strip_protocol(place)).rstrip("/"))


@contextlib.contextmanager
def storage_errors(uri: str) -> Iterator[None]:
    """Tell what the driver of a storage raises, whatever its type; see ``pipeline.files.faults``.

    Passes on whether a file is there or not, which callers ask for, and what a local disk says, which names
    its path.

    Raises:
        MaskMillError: ``storage_unreachable``.
    """
    try:
        yield
    except (FileNotFoundError, FileExistsError, MaskMillError):
        raise
    except Exception as error:
        if is_remote(uri):
            raise unreachable(uri, error) from error
        if not isinstance(error, PermissionError):
            raise
        raise FailedWork(
            "storage_unreachable",
            f"no access to {uri}: {error}",
            "Check the permissions of the place.",
        ) from error
