"""A real server on the loopback interface, asked by a plain HTTP client."""

from __future__ import annotations

import http.client
import io
import json
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PIL import Image

from models.errors import MaskMillError
from pipeline.serving.limits import Limits
from pipeline.serving.registry import Entry, HeatAnswer, ModelInfo
from pipeline.toyworld import scenes as toyworld
from tests.pipeline.serving.harness import Reply, Server, maps, png

SCENE = toyworld.scene(2026, 0, 128)
PHOTO = png(SCENE.image)
LADYBUG = {"prompts": [{"text": "ladybug"}]}


class Patient:
    """A model that answers when it is told to."""

    def __init__(self) -> None:
        self.asked = threading.Semaphore(0)
        self.go = threading.Semaphore(0)
        self.calls = 0

    def predict(self, image: Any, prompts: Any, context: Any, size: tuple[int, int]) -> HeatAnswer:
        self.calls += 1
        self.asked.release()
        assert self.go.acquire(timeout=30)
        return HeatAnswer(tuple(p.text for p in prompts), np.zeros((len(prompts), *size), np.uint8))


def one(model: Any, **info: Any) -> list[Entry]:
    return [Entry(ModelInfo(name="one", kind="clipseg", title="a model", **info), lambda: model)]


def knock(server: Server) -> Reply:
    """503 if no place is free, 415 if there is."""
    return server.post("/api/preview", Content_Type="application/json")


def test_masks_of_the_toy_teacher(toy: Server) -> None:
    names = ["sunflower", "chessboard", "grass"]
    reply = toy.segment(PHOTO, {"prompts": [{"text": name} for name in names]})
    assert reply.status == 200, reply.body
    answer = reply.json
    assert (answer["model"], answer["kind"]) == ("toy", "labels")
    assert (answer["width"], answer["image_height"]) == (128, 128)
    assert [entry["name"] for entry in answer["legend"]] == [*names, "something else"]
    assert [entry["other"] for entry in answer["legend"]] == [False, False, False, True]
    confidence, labels = maps(reply)
    assert confidence.dtype == labels.dtype == np.uint8 and labels.shape == (128, 128)
    for index, name in enumerate(names):
        truth = SCENE.labels == toyworld.CLASSES.index(name)
        found = labels == index
        assert (found & truth).sum() / (found | truth).sum() > 0.5, name
    alone = toy.segment(PHOTO, {"prompts": [{"text": "grass"}], "context": []})
    assert (maps(alone)[1] == 0).all()


def test_words_and_examples_for_clipseg(toy: Server) -> None:
    example = toyworld.scene(2026, 1, 64)
    mask = (example.labels == toyworld.CLASSES.index("ladybug")).astype(np.uint8) * 255
    prompts = [{"text": "zebra"}, {"image": "e", "mask": "m", "name": " a  ladybug "}, {"image": "e"}]
    request = {"model": "prompts", "prompts": prompts}
    reply = toy.segment(PHOTO, request, {"e": png(example.image), "m": png(mask)})
    assert reply.status == 200, reply.body
    assert reply.json["kind"] == "heat"
    assert [entry["name"] for entry in reply.json["legend"]] == ["zebra", "a ladybug", "example"]
    assert len({entry["color"] for entry in reply.json["legend"]}) == 3
    heat = maps(reply)
    assert len(heat) == 3 and all(one.shape == (128, 128) for one in heat)
    assert (heat[1] != heat[2]).any()


def test_a_large_image_gets_maps_of_bounded_size(start: Callable[..., Server]) -> None:
    sizes = []

    class Sized:
        def predict(self, image: Any, prompts: Any, context: Any, size: tuple[int, int]) -> HeatAnswer:
            sizes.append((image.shape, size))
            return HeatAnswer(("x",), np.zeros((1, *size), np.uint8))

    server = start(one(Sized()), Limits(per_minute=0, result_pixels=5000, image_pixels=60_000))
    turned = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    Image.new("RGB", (300, 200)).save(turned, "JPEG", exif=exif)
    answer = server.segment(turned.getvalue(), LADYBUG).json
    assert sizes == [((300, 200, 3), (answer["height"], answer["width"]))]
    assert (answer["image_height"], answer["image_width"]) == (300, 200)
    assert 4900 < answer["height"] * answer["width"] < 5100
    assert answer["height"] / answer["width"] == pytest.approx(1.5, abs=0.03)
    assert maps(server.segment(PHOTO, LADYBUG))[0].size <= 5041
    for shape in ((1, 60_000, 3), (60_000, 1, 3)):
        thin = server.segment(png(np.zeros(shape, np.uint8)), LADYBUG).json
        assert max(thin["height"], thin["width"]) == 16_384 and min(thin["height"], thin["width"]) == 1
    sizes[2:] = []
    too_large = server.segment(png(np.zeros((300, 201, 3), np.uint8)), LADYBUG)
    assert (too_large.status, too_large.json["code"]) == (400, "too_large") and len(sizes) == 2


ONE = {"image": PHOTO}
EXAMPLE = {"image": PHOTO, "e": PHOTO}
ASKED = {"model": "prompts", "prompts": [{"image": "e", "mask": "m"}]}
WRONG: dict[str, tuple[Any, dict[str, bytes], int, str]] = {
    "no image": (LADYBUG, {}, 400, "image_invalid"),
    "text as image": (LADYBUG, {"image": b"hello"}, 400, "not_an_image"),
    "empty image": (LADYBUG, {"image": b""}, 400, "empty"),
    "half an image": (LADYBUG, {"image": PHOTO[: len(PHOTO) // 2]}, 400, "truncated"),
    "no prompts": ({}, ONE, 400, "prompt_invalid"),
    "no JSON": ("{", ONE, 400, "request_invalid"),
    "unknown field": ({"promts": []}, ONE, 400, "request_invalid"),
    "neither kind": ({"prompts": [{}]}, ONE, 400, "request_invalid"),
    "both kinds": ({"prompts": [{"text": "a", "image": "b"}]}, ONE, 400, "request_invalid"),
    "unknown model": ({"model": "x", **LADYBUG}, ONE, 404, "name_unknown"),
    "blank": ({"prompts": [{"text": " "}]}, ONE, 400, "prompt_invalid"),
    "twice": ({"prompts": [{"text": "a b"}, {"text": " a  b"}]}, ONE, 400, "prompt_invalid"),
    "long": ({"prompts": [{"text": "a" * 201}]}, ONE, 400, "prompt_invalid"),
    "long for the model": ({"prompts": [{"text": "qxjz " * 20}]}, ONE, 400, "prompt_invalid"),
    "many": ({"prompts": [{"text": f"a{i}"} for i in range(25)]}, ONE, 400, "prompt_invalid"),
    "much context": ({**LADYBUG, "context": ["a"] * 201}, ONE, 400, "prompt_invalid"),
    "example for a teacher": ({"prompts": [{"image": "e"}]}, EXAMPLE, 400, "model_unsupported"),
    "example missing": ({**ASKED, "prompts": [{"image": "e"}]}, ONE, 400, "image_invalid"),
    "small mask": (ASKED, EXAMPLE | {"m": png(np.ones((4, 4), np.uint8))}, 400, "mask_invalid"),
    "empty mask": (ASKED, EXAMPLE | {"m": png(np.zeros((128, 128), np.uint8))}, 400, "mask_invalid"),
    "many files": (LADYBUG, {f"f{i}": b"x" for i in range(18)}, 400, "form_invalid"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_requests(toy: Server, case: str) -> None:
    request, files, status, code = WRONG[case]
    reply = toy.post("/api/segment", files, request)
    assert (reply.status, reply.json["code"]) == (status, code), reply.body
    assert set(reply.json) == {"code", "message", "remedy"} and all(reply.json.values())
    assert b"Traceback" not in reply.body and b".py" not in reply.body


def test_forms_that_are_none(toy: Server) -> None:
    assert toy.post("/api/segment", {}, Content_Type="application/json").json["code"] == "form_missing"
    assert toy.post("/api/segment", {}, Content_Type="multipart/form-data").json["code"] == "form_invalid"
    assert toy.get("/api/segment").status == 405
    assert toy.get("/nothing").json["code"] == "request_invalid"
    assert toy.get("/docs").status == toy.get("/redoc").status == 404


def test_an_upload_is_refused_by_its_size_while_it_arrives(start: Callable[..., Server]) -> None:
    server = start(one(Patient()), Limits(per_minute=0, upload_bytes=100_000))
    reply = server.segment(b"x" * 100_001, LADYBUG)
    assert (reply.status, reply.json["code"]) == (413, "upload_too_large")
    # Without a declared length, in chunks that never end.
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
    headers = {"Content-Type": "multipart/form-data; boundary=b"}
    sent = 0

    def endless() -> Any:
        nonlocal sent
        yield b'--b\r\nContent-Disposition: form-data; name="image"; filename="i"\r\n\r\n'
        while sent < 50_000_000:
            sent += 10_000
            yield b"x" * 10_000

    try:
        connection.request("POST", "/api/segment", endless(), headers, encode_chunked=True)
        assert connection.getresponse().status == 413
    except (BrokenPipeError, ConnectionResetError):
        pass  # cut off while it sends
    assert sent < 20_000_000
    assert server.get("/health").status == 200


def test_a_slow_upload_is_given_up(start: Callable[..., Server]) -> None:
    server = start(one(Patient()), Limits(per_minute=0, upload_seconds=0.3, waiting=0))
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
        connection.sendall(
            b"POST /api/segment HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n"
            b"Content-Type: multipart/form-data; boundary=b\r\n\r\n--b\r\n"
        )
        answer = b"".join(iter(lambda: connection.recv(65536), b""))  # it is closed after the answer
    assert b" 408 " in answer.partition(b"\r\n")[0] and b"upload_too_slow" in answer


def test_the_rate_of_a_client_is_limited(start: Callable[..., Server]) -> None:
    server = start(one(Patient()), Limits(per_minute=6, burst=2))
    files = {"image": b"no image"}
    assert [server.post("/api/preview", files).status for _ in range(3)] == [400, 400, 429]
    refused = server.segment(PHOTO, LADYBUG)
    assert refused.status == 429 and 1 <= int(refused.headers["Retry-After"]) <= 10
    assert refused.json["code"] == "too_many_requests" and "Wait" in refused.json["remedy"]
    assert server.get("/api/models").status == server.get("/health").status == 200


def test_one_is_served_some_wait_and_the_rest_is_refused(start: Callable[..., Server]) -> None:
    model = Patient()
    server = start(one(model), Limits(per_minute=0, waiting=2))
    replies: list[int] = []

    def ask() -> None:
        replies.append(server.segment(PHOTO, LADYBUG).status)

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    assert model.asked.acquire(timeout=20)
    deadline = time.monotonic() + 20
    while (busy := knock(server)).status != 503:
        assert time.monotonic() < deadline
    assert busy.json["code"] == "busy" and busy.headers["Retry-After"] == "2"
    assert server.get("/health").status == 200
    assert model.calls == 1  # one at a time
    for _ in threads:
        model.go.release()
    for thread in threads:
        thread.join(20)
    assert replies == [200] * 3 and model.calls == 3
    assert server.post("/api/preview", {"image": PHOTO}).status == 200


def test_work_of_a_client_that_has_gone_is_not_done(start: Callable[..., Server]) -> None:
    model = Patient()
    server = start(one(model), Limits(per_minute=0, waiting=1))
    first = threading.Thread(target=server.segment, args=(PHOTO, LADYBUG))
    first.start()
    assert model.asked.acquire(timeout=20)
    part = b"--b\r\nContent-Disposition: form-data; name="
    body = part + b'"request"\r\n\r\n' + json.dumps(LADYBUG).encode() + b"\r\n"
    body += part + b'"image"; filename="i"\r\n\r\n' + PHOTO + b"\r\n--b--\r\n"
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        head = f"POST /api/segment HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
        connection.sendall(head.encode() + b"Content-Type: multipart/form-data; boundary=b\r\n\r\n" + body)
        while knock(server).status != 503:
            time.sleep(0.02)  # until the second has its place
    deadline = time.monotonic() + 20
    while knock(server).status == 503:
        assert time.monotonic() < deadline  # its place is free again before the first is done
    third = threading.Thread(target=server.segment, args=(PHOTO, LADYBUG))
    third.start()
    model.go.release()
    first.join(20)
    assert model.asked.acquire(timeout=20)
    model.go.release()
    third.join(20)
    assert model.calls == 2


def test_other_hosts_and_other_sites_are_refused(toy: Server, start: Callable[..., Server]) -> None:
    rebound = toy.get("/api/models", Host="evil.example")
    assert rebound.status == 400 and rebound.headers["X-Frame-Options"] == "DENY"
    files = {"image": PHOTO}
    for headers in ({"Origin": "https://evil.example"}, {"Origin": "null"}, {"Sec_Fetch_Site": "cross-site"}):
        refused = toy.post("/api/segment", files, LADYBUG, **headers)
        assert (refused.status, refused.json["code"]) == (403, "origin_not_allowed")
        assert "Access-Control-Allow-Origin" not in refused.headers
    own = toy.post("/api/segment", files, LADYBUG, Origin=toy.url, Sec_Fetch_Site="same-origin")
    assert own.status == 200
    public = start(one(Patient()), loopback=False, names=["studio.local"])
    assert public.get("/health", Host="192.168.3.4:80").status == 200
    assert public.get("/health", Host="studio.local").status == 200
    assert public.get("/health", Host="evil.example").status == 400


def test_models_load_when_asked_for_and_say_how_it_went(start: Callable[..., Server]) -> None:
    go = threading.Event()
    attempts: list[int] = []

    def slow() -> Any:
        assert go.wait(30)
        model = Patient()
        model.go.release()
        return model

    def broken() -> Any:
        attempts.append(1)
        raise MaskMillError("weights_missing", "There is no /secret/file.", "Put it there.")

    def crashing() -> Any:
        raise ZeroDivisionError("in /secret/place")

    def named(name: str, load: Callable[[], Any]) -> Entry:
        return Entry(ModelInfo(name=name, kind="clipseg", title=name), load)

    entries = [named("slow", slow), named("broken", broken), named("crashing", crashing)]
    server = start(entries, Limits(per_minute=0, load_seconds=0.2))
    states = lambda: {m["name"]: m["state"] for m in server.get("/api/models").json["models"]}  # noqa: E731
    assert set(states().values()) == {"idle"}
    reply = server.segment(PHOTO, {"model": "slow", **LADYBUG})
    assert (reply.status, reply.json["code"]) == (503, "model_loading") and reply.headers["Retry-After"]
    assert states()["slow"] == "loading"
    go.set()
    deadline = time.monotonic() + 20
    while states()["slow"] != "ready":
        assert time.monotonic() < deadline
    assert server.segment(PHOTO, {"model": "slow", **LADYBUG}).status == 200
    for _ in range(2):
        reply = server.segment(PHOTO, {"model": "broken", **LADYBUG})
        assert (reply.status, reply.json["code"]) == (500, "weights_missing")
    assert len(attempts) == 2  # a failure is no verdict
    told = server.get("/api/models").json["models"][1]
    assert (told["state"], told["error"]["remedy"]) == ("failed", "Put it there.")
    reply = server.segment(PHOTO, {"model": "crashing", **LADYBUG})
    assert (reply.status, reply.json["code"]) == (500, "model_failed") and b"secret" not in reply.body
    public = start(entries, Limits(per_minute=0), loopback=False)
    assert b"secret" not in public.segment(PHOTO, {"model": "broken", **LADYBUG}).body
    assert b"secret" not in public.get("/api/models").body
    assert server.post("/api/models/none/load").status == 404


def test_a_model_that_breaks_tells_the_log_and_not_the_client(
    start: Callable[..., Server], caplog: pytest.LogCaptureFixture
) -> None:
    class Broken:
        def predict(self, *_: Any) -> Any:
            raise RuntimeError("at /secret/place")

    server = start(one(Broken()))
    reply = server.segment(PHOTO, LADYBUG)
    assert (reply.status, reply.json["code"]) == (500, "internal") and b"secret" not in reply.body
    assert "secret" in caplog.text
    assert reply.headers["X-Content-Type-Options"] == "nosniff"


def test_every_answer_has_the_security_headers(toy: Server) -> None:
    paths = ("/", "/page.css", "/page.js", "/masks.js", "/example.js", "/api/models", "/health", "/nothing")
    for path in paths:
        reply = toy.get(path)
        assert reply.headers["X-Content-Type-Options"] == "nosniff"
        policy = reply.headers["Content-Security-Policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
        assert reply.headers["X-Frame-Options"] == "DENY"
        if path.endswith((".js", ".css")):
            assert reply.status == 200 and b"://" not in reply.body


def test_samples_preview_and_documentation(toy: Server) -> None:
    samples = toy.get("/api/samples").json
    assert {name for sample in samples for name in sample["classes"]} == set(toyworld.CLASSES)
    picture = Image.open(io.BytesIO(toy.get(samples[0]["url"]).body))
    assert picture.size == (256, 256)
    assert toy.get("/api/samples/99.png").status == 400
    tiff = io.BytesIO()
    Image.fromarray(SCENE.image).save(tiff, "TIFF")
    shown = toy.post("/api/preview", {"image": tiff.getvalue()})
    assert shown.headers["Content-Type"] == "image/png"
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(shown.body))), SCENE.image)
    schema = toy.get("/openapi.json").json
    form = schema["paths"]["/api/segment"]["post"]["requestBody"]["content"]["multipart/form-data"]["schema"]
    assert {"image", "request"} <= set(form["properties"])
    assert {"SegmentRequest", "PromptRequest", "SegmentReply"} <= set(schema["components"]["schemas"])


def test_ids_above_a_byte_come_in_two_maps(start: Callable[..., Server]) -> None:
    from pipeline.serving.registry import LabelAnswer

    class Many:
        def predict(self, image: Any, prompts: Any, context: Any, size: tuple[int, int]) -> LabelAnswer:
            ids = np.arange(size[0] * size[1]).reshape(size).astype(np.uint16) % 300
            return LabelAnswer(tuple(f"c{i}" for i in range(300)), ids, np.full(size, 200, np.uint8))

    server = start(one(Many(), vocabulary=("own",)))
    reply = server.segment(PHOTO, {})
    confidence, low, high = maps(reply)
    ids = low.astype(int) + 256 * high.astype(int)
    np.testing.assert_array_equal(ids.ravel(), np.arange(128 * 128) % 300)
    assert (confidence == 200).all() and len(reply.json["legend"]) == 300
