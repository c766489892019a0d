"""What stopped a command, in words: exceptions of the system and of other libraries as errors with a remedy.

Everything that the user can mend is told here, by one rule for each kind of cause rather than by a list of
exception types at each place. What is left is a fault of MaskMill.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator

from models.errors import Damaged, FailedWork, MaskMillError, WrongUse
from pipeline.files.redaction import redact

_AGAIN = "Finished work is kept: run the same command again."

# (errno, code, what is wrong with the place, remedy)
_SYSTEM: tuple[tuple[frozenset[int], str, str, str], ...] = (
    (
        frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG}),
        "disk_full",
        "no space is left for {place}",
        f"Make room, or name another place. {_AGAIN}",
    ),
    (
        frozenset({errno.EACCES, errno.EPERM}),
        "no_permission",
        "no permission for {place}",
        "Change the rights of the place, or name another one.",
    ),
    (
        frozenset({errno.EROFS}),
        "no_permission",
        "{place} is on a file system that cannot be written to",
        "Name another place.",
    ),
    (frozenset({errno.ENOENT}), "not_found", "there is no {place}", "Check the path."),
    (
        frozenset({errno.ENOTDIR, errno.EEXIST}),
        "path_invalid",
        "a part of {place} is a file, not a folder",
        "Name another place, or move that file away.",
    ),
    (frozenset({errno.EISDIR}), "path_invalid", "{place} is a folder, not a file", "Name a file."),
    (
        frozenset({errno.ENAMETOOLONG, errno.EINVAL}),
        "path_invalid",
        "{place} is no name that this file system takes",
        "Name another place.",
    ),
    (
        frozenset({errno.ELOOP}),
        "path_invalid",
        "{place} is a symbolic link that leads to itself",
        "Remove the link.",
    ),
    (
        frozenset({errno.EMFILE, errno.ENFILE}),
        "too_many_files",
        "too many files are open, at {place}",
        "Raise the limit: ulimit -n 65536.",
    ),
    (
        frozenset({errno.EADDRINUSE, errno.EADDRNOTAVAIL}),
        "address_in_use",
        "the network address cannot be used: {place}",
        "Choose another port or host.",
    ),
)

_OUT_OF_MEMORY = (
    "out_of_memory",
    "the memory is full",
    f"Close other programs, use smaller images or batches, or a larger machine. {_AGAIN}",
)
# Packages whose exceptions say that something out of reach did not answer as it should.
_STORAGE = {"botocore", "aiobotocore", "boto3", "s3fs", "gcsfs", "adlfs", "azure", "google", "fsspec"}
_NETWORK = {
    "aiohttp",
    "requests",
    "urllib3",
    "httpx",
    "httpcore",
    "urllib",
    "http",
    "ssl",
    "socket",
    "asyncio",
}
_TRACKING = {"mlflow", "sqlalchemy", "sqlite3", "alembic"}
_ADVICE = re.compile(r"\s*Failed to [\w ]+ after \d+/\d+ attempts.*", re.DOTALL)
_OURS = {"jobs", "pipeline", "models", "benchmarks"}

_REMOTE = (
    (
        re.compile(
            r"expired|ExpiredToken|InvalidToken|TokenRefresh|InvalidAccessKeyId|SignatureDoesNotMatch"
            r"|RequestTimeTooSkewed",
            re.IGNORECASE,
        ),
        "the credentials for {place} are refused",
        "Renew them (for S3: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN, or the profile). "
        + _AGAIN,
    ),
    (
        re.compile(r"credential", re.IGNORECASE),
        "there are no credentials for {place}",
        "Set them (for S3: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, a profile, or a role).",
    ),
    (
        re.compile(r"Access[_ ]?Denied|Forbidden|AllAccessDisabled|\b403\b|Permission", re.IGNORECASE),
        "no access to {place}",
        "Check the rights of the credentials. Without the right to list a bucket (s3:ListBucket), give a "
        "list file of addresses instead of a folder.",
    ),
    (
        re.compile(r"NoSuchBucket|NO_SUCH_BUCKET|bucket does not exist", re.IGNORECASE),
        "there is no bucket for {place}",
        "Create the bucket first, or correct its name.",
    ),
    (
        re.compile(
            r"SlowDown|SLOW_DOWN|reduce your request rate|Please try again|\b503\b|ServiceUnavailable", re.I
        ),
        "the storage of {place} asks for fewer requests",
        f"Try again later, or with fewer workers. {_AGAIN}",
    ),
    (
        re.compile(r"endpoint|connect|resolve|name or service|host", re.IGNORECASE),
        "cannot reach {place}",
        f"Check the network and the endpoint (for S3: AWS_ENDPOINT_URL). {_AGAIN}",
    ),
)


def explain(error: BaseException, place: str = "") -> MaskMillError | None:
    """What the user can mend about an exception, or None: then it is a fault of MaskMill.

    Args:
        error: the exception; its causes count too, so that Ray's wrappers do not hide them.
        place: path or URI that was worked on, if the exception does not say it.
    """
    chain = list(_chain(error))
    # What Ray wraps counts, not its wrapper.
    for one in [one for one in chain if _package(one) != "ray"] or chain:
        told = _told(one, place)
        if told is not None:
            return told
    return None


def unreachable(place: str, error: BaseException) -> MaskMillError:
    """``storage_unreachable`` for a remote place, whatever its driver raised."""
    reason = one_line(error)
    signs = f"{type(error).__name__} {reason} {error.__cause__ or ''}"
    unknown = ("cannot use {place}", f"Check the address, the network and the rights. {_AGAIN}")
    what, remedy = next((told for sign, *told in _REMOTE if sign.search(signs)), unknown)
    return FailedWork("storage_unreachable", f"{what.format(place=redact(place))}: {reason}", remedy)


def says_damage(error: Exception) -> bool:
    """Whether a reader complains about the content of a file, rather than about its place.

    Arrow raises plain ``OSError`` for both.
    """
    return not isinstance(error, OSError) or (error.errno is None and "AWS Error" not in str(error))


def _told(error: BaseException, place: str) -> MaskMillError | None:
    if isinstance(error, MaskMillError):
        return error
    package = _package(error)
    if "://" in place and not isinstance(error, AssertionError) and package not in ("ray", *_OURS):
        return unreachable(place, error)
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return FailedWork(*_OUT_OF_MEMORY)
    if package in _STORAGE:
        return unreachable(place or "the storage", error)
    if package in _NETWORK and isinstance(error, Exception):
        return unreachable(place or "the network", error)
    if package in _TRACKING:
        return FailedWork(
            "tracking_unreachable",
            f"MLflow: {one_line(error)}",
            "Check --tracking (or MLFLOW_TRACKING_URI); --tracking off runs without it.",
        )
    if isinstance(error, OSError):
        return _system(error, place)
    if isinstance(error, UnicodeError):
        return Damaged(
            "document_invalid",
            f"{place or 'a file or an argument'} is not UTF-8 text: {one_line(error)}",
            "Save it as UTF-8.",
        )
    if isinstance(error, RecursionError):
        return WrongUse("document_invalid", f"{place or 'an input'} is nested too deeply.", "Flatten it.")
    if isinstance(error, ImportError) and (error.name or "").partition(".")[0] not in _OURS:
        return FailedWork(
            "package_missing",
            f"{error.name or 'a package'} cannot be imported: {one_line(error)}",
            "Install what MaskMill needs: pip install -r requirements.txt.",
        )
    if package == "ray":
        return FailedWork(
            "ray_failed", f"Ray stopped the run: {one_line(error)}", f"{_AGAIN} -v shows Ray's own messages."
        )
    return None


def _system(error: OSError, place: str) -> MaskMillError:
    paths = [str(path) for path in (error.filename2, error.filename) if path is not None]
    where = redact(paths[0] if paths else place) or "the place"
    reason = error.strerror or one_line(error)
    if error.errno == errno.ENOMEM:
        return FailedWork(*_OUT_OF_MEMORY)
    if "AWS Error" in str(error) or isinstance(error, ConnectionError | TimeoutError):
        return unreachable(where, error)
    for numbers, code, what, remedy in _SYSTEM:
        if error.errno in numbers:
            return FailedWork(code, f"{what.format(place=where)}: {reason}", remedy)
    return FailedWork(
        "storage_unreachable",
        f"{where} cannot be used: {reason}",
        f"Check the disk or the network share. {_AGAIN}",
    )


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The exception and its causes, outermost first; Ray keeps the cause in an attribute."""
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        inner = getattr(current, "cause", None)
        current = inner if isinstance(inner, BaseException) else current.__cause__


def _package(error: BaseException) -> str:
    return type(error).__module__.partition(".")[0]


def one_line(error: BaseException) -> str:
    """The exception in one line, without secrets; of a remote traceback its last line.

    Ray Data appends advice to programmers, which is left out.
    """
    lines = [line.strip() for line in _ADVICE.sub("", str(error)).splitlines() if line.strip()]
    if _package(error) == "ray":
        lines = lines[-1:]
    text = " ".join(lines) or type(error).__name__
    return redact(text, assignments=False)[:500]
