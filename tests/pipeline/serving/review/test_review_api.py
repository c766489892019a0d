"""The API behind the page of a review, over HTTP."""

from __future__ import annotations

import base64
import gzip
import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.review.desk import encode_page_mask, open_desk
from pipeline.serving.limits import Limits
from pipeline.serving.review.app import create_review_app
from tests.pipeline.review.reviews import TOYWORLD, make_reviewed, queue_of, row_id, truth_of
from tests.pipeline.serving.harness import Server, serving

FIRST = {"If-None-Match": "*"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_reviewed(tmp_path_factory.mktemp("review"), [0.5, 0.4, 0.3, 0.0])


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    limits = Limits(per_minute=0, upload_bytes=20_000)
    with serving(create_review_app(open_desk(queue_of(folder, 4, known=(0,))), limits), limits) as server:
        yield server


def painting(labels: np.ndarray, who: str = "Ann") -> dict[str, str]:
    mask = base64.b64encode(encode_page_mask(labels)).decode()
    return {"decision": "painted", "reviewer": who, "mask": mask}


def test_the_queue_says_why_but_not_which_is_known(server: Server, folder: Path) -> None:
    queue = server.get("/api/review").json
    assert [item["id"] for item in queue["items"]] == [str(row_id(folder, number)) for number in range(4)]
    assert queue["items"][0]["reasons"] == [{"kind": "quality", "text": "low quality, 0.50"}]
    assert [one["name"] for one in queue["classes"]] == list(TOYWORLD.names)
    assert "known" not in str(queue["items"]) and "truth" not in str(queue)


def test_an_image_its_labels_and_what_is_saved(server: Server, folder: Path) -> None:
    path = f"/api/review/{row_id(folder, 1)}"
    assert server.get(path).json["saved"] is None
    image = np.asarray(Image.open(io.BytesIO(server.get(f"{path}/image").body)))
    assert image.shape == (48, 48, 3)
    before = server.get(f"{path}/mask").body
    first = server.put(path, painting(truth_of(folder, 1)), **FIRST)
    assert first.status == 200 and first.json["reviewer"] == "Ann"
    found = np.frombuffer(gzip.decompress(server.get(f"{path}/mask").body), "<u2").reshape(48, 48)
    np.testing.assert_array_equal(found, truth_of(folder, 1))
    assert server.get(f"{path}/mask?original=true").body == before
    assert server.get(f"{path}/thumbnail").headers["Content-Type"] == "image/jpeg"
    assert server.get(path).json["saved"] == first.json
    # The same again is the same; the second of two is told what the first said.
    assert server.put(path, painting(truth_of(folder, 1)), **FIRST).json == first.json
    other = server.put(path, {"decision": "rejected", "reviewer": "Bob"}, **FIRST)
    assert other.status == 412 and other.json["saved"] == first.json and "Ann" in other.json["message"]
    tag = {"If-Match": f'"{first.json["tag"]}"'}
    assert server.put(path, {"decision": "rejected", "reviewer": "Bob"}, **tag).status == 200


def test_agreement_is_told(server: Server, folder: Path) -> None:
    server.put(f"/api/review/{row_id(folder, 0)}", {"decision": "rejected", "reviewer": "Ann"}, **FIRST)
    assert server.get("/api/review/agreement").json == ["Ann: 1 of 1 judged right"]


@pytest.mark.parametrize(
    ("value", "headers", "status", "code"),
    [
        ({"decision": "accepted"}, {}, 428, "request_invalid"),
        ({"decision": "good"}, FIRST, 400, "request_invalid"),
        ({"decision": "accepted", "truth": 1}, FIRST, 400, "request_invalid"),
        ({"decision": "accepted", "reviewer": "x" * 81}, FIRST, 400, "request_invalid"),
        ({"decision": "accepted", "mask": "AAAA"}, FIRST, 400, "mask_invalid"),
        ({"decision": "painted"}, FIRST, 400, "mask_invalid"),
        (painting(np.full((48, 48), 14, np.uint8)), FIRST, 400, "mask_invalid"),
        (painting(np.zeros((48, 47), np.uint8)), FIRST, 400, "mask_invalid"),
        (b"{", FIRST, 400, "request_invalid"),
        (b" " * 20_001, FIRST, 413, "upload_too_large"),
        ({"decision": "accepted"}, FIRST | {"Content-Type": "text/plain"}, 415, "request_invalid"),
        ({"decision": "accepted"}, FIRST | {"Origin": "http://other.example"}, 403, "origin_not_allowed"),
    ],
)
def test_other_requests_are_refused(
    server: Server, folder: Path, value: object, headers: dict[str, str], status: int, code: str
) -> None:
    path = f"/api/review/{row_id(folder, 3)}"
    reply = server.put(path, value, **headers)
    assert (reply.status, reply.json["code"]) == (status, code)
    assert server.get(path).json["saved"] is None


def test_what_is_not_there(server: Server) -> None:
    for path in ("/api/review/5", "/api/review/5/mask", "/api/review/5/image"):
        assert (server.get(path).status, server.get(path).json["code"]) == (404, "name_unknown")
    assert server.get("/api/review/x").status == 400
    assert server.get("/api/review", Host="evil.example").status == 400
