"""Exceptions of the system and of other libraries, in words with a remedy."""

from __future__ import annotations

import errno
import os

import aiohttp
import botocore.exceptions
import pytest

from models.errors import MaskMillError, WrongUse
from pipeline.files.faults import explain, one_line, says_damage


def client_error(code: str) -> botocore.exceptions.ClientError:
    return botocore.exceptions.ClientError({"Error": {"Code": code, "Message": "no"}}, "GetObject")


@pytest.mark.parametrize("number", sorted(errno.errorcode))
def test_every_error_of_the_system_is_told_with_its_path(number: int) -> None:
    told = explain(OSError(number, os.strerror(number), "/data/x.png"))
    assert told is not None and told.code != "internal" and told.remedy
    assert "/data/x.png" in told.message or told.code == "out_of_memory"


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (OSError(errno.ENOSPC, "No space left", "/out/part"), "disk_full", "/out/part"),
        (IsADirectoryError(errno.EISDIR, "Is a directory", "/x"), "path_invalid", "is a folder"),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), "no_permission", "/x"),
        (ConnectionResetError(errno.ECONNRESET, "reset"), "storage_unreachable", "reset"),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"), "document_invalid", "UTF-8"),
        (RecursionError("maximum recursion depth exceeded"), "document_invalid", "nested"),
        (MemoryError(), "out_of_memory", "memory"),
        (ModuleNotFoundError("No module named 'cv2'", name="cv2"), "package_missing", "cv2"),
        (client_error("SlowDown"), "storage_unreachable", "fewer requests"),
        (client_error("AccessDenied"), "storage_unreachable", "no access"),
        (client_error("ExpiredToken"), "storage_unreachable", "credentials"),
        (client_error("NoSuchBucket"), "storage_unreachable", "no bucket"),
        (botocore.exceptions.NoCredentialsError(), "storage_unreachable", "no credentials"),
        (
            botocore.exceptions.EndpointConnectionError(endpoint_url="http://x"),
            "storage_unreachable",
            "reach",
        ),
        (aiohttp.ServerDisconnectedError(), "storage_unreachable", "Server disconnected"),
        (
            OSError("When reading: AWS Error ACCESS_DENIED during HeadObject"),
            "storage_unreachable",
            "no access",
        ),
    ],
)
def test_what_the_user_can_mend(error: Exception, code: str, words: str) -> None:
    told = explain(error)
    assert told is not None and told.code == code and words in told.message and told.remedy


@pytest.mark.parametrize(
    "error", [TypeError("x"), KeyError("y"), AssertionError(), ImportError("no name", name="pipeline.x")]
)
def test_the_rest_is_a_fault_of_ours(error: Exception) -> None:
    assert explain(error) is None


def test_causes_count() -> None:
    known = WrongUse("wrong_use", "no", "yes")
    try:
        raise RuntimeError("wrapper") from known
    except RuntimeError as error:
        assert explain(error) is known


def test_ray_hides_no_cause() -> None:
    from ray.exceptions import RayTaskError, WorkerCrashedError

    full = RayTaskError("work", "Traceback …", OSError(errno.ENOSPC, "No space left on device", "/out/x"))
    for error in (full, full.as_instanceof_cause()):
        told = explain(error)
        assert isinstance(told, MaskMillError) and told.code == "disk_full" and "/out/x" in told.message
    advised = ValueError(
        "bad\nFailed to apply UDF transform after 1/1 attempts (total 0s).\nTo change, DataContext"
    )
    assert one_line(advised) == "bad"
    told = explain(WorkerCrashedError())
    assert told is not None and told.code == "ray_failed"
    ours = RayTaskError("work", "Traceback …", TypeError("x"))
    assert explain(ours.as_instanceof_cause()) is None


def test_a_remote_place_is_named_whatever_its_driver_raises() -> None:
    told = explain(ValueError("Invalid endpoint: nonsense"), "s3://me:hunter2@bucket/x")
    assert told is not None and told.code == "storage_unreachable"
    assert "bucket/x" in told.message and "hunter2" not in told.message


def test_secrets_are_not_repeated() -> None:
    told = explain(OSError("503 for https://h/x?sig=hunter2"))
    assert told is not None and "hunter2" not in str(told)


def test_a_torn_file_is_not_a_denied_one() -> None:
    assert says_damage(OSError("Couldn't deserialize thrift")) and says_damage(ValueError("magic bytes"))
    assert not says_damage(OSError(errno.EIO, "x")) and not says_damage(OSError("AWS Error SLOW_DOWN"))
