"""How S3 is asked: what its drivers do not take from the environment themselves.

They read the credentials (``AWS_ACCESS_KEY_ID`` and so on, a profile, a role), ``AWS_DEFAULT_REGION`` and
``AWS_ENDPOINT_URL``. Two variables that GDAL and others know are read here:

- ``AWS_NO_SIGN_REQUEST=YES``: requests without credentials, for public buckets;
- ``AWS_REQUEST_PAYER=requester``: for buckets whose readers pay.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pyarrow.fs import FileSystem


def driver_options(uri: str) -> dict[str, Any]:
    """Options for the fsspec file system of a URI by the environment; none but for S3."""
    options: dict[str, Any] = {}
    if uri.startswith("s3://"):
        if os.environ.get("AWS_NO_SIGN_REQUEST", "").lower() in ("1", "yes", "true", "on"):
            options["anon"] = True
        if os.environ.get("AWS_REQUEST_PAYER", "").lower() == "requester":
            options["requester_pays"] = True
    return options


def arrow_s3(bucket: str, *, anonymous: bool) -> FileSystem:
    """Arrow's own client for a bucket, which cannot pay for requests."""
    from pyarrow import fs as arrow

    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    options: dict[str, Any] = {"anonymous": anonymous}
    if endpoint:
        scheme, _, host = endpoint.rpartition("://")
        options |= {"endpoint_override": host.rstrip("/"), "scheme": scheme or "https"}
        region = region or "us-east-1"
    return arrow.S3FileSystem(region=region or arrow.resolve_s3_region(bucket), **options)
