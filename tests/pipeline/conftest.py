from __future__ import annotations

import uuid
from collections.abc import Iterator

import boto3
import pytest

from benchmarks.faults.object_store import object_store


@pytest.fixture(scope="module")
def s3_server() -> Iterator[None]:
    """An object store on loopback."""
    with object_store():
        yield


@pytest.fixture
def bucket(s3_server: None) -> str:
    """A new bucket on it."""
    name = f"bucket-{uuid.uuid4().hex[:8]}"
    boto3.client("s3").create_bucket(Bucket=name)
    return f"s3://{name}/table"
