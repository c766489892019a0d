from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from models.errors import WrongUse
from pipeline.retraining.webhook import ATTEMPTS, notify, webhook_url
from tests.pipeline.retraining.receiver import SECRET, Receiver

EVENT = {"event": "promoted", "name": "pets", "version": "3", "why": "ä"}


@pytest.fixture
def new() -> Iterator[Callable[[], Receiver]]:
    made: list[Receiver] = []

    def start() -> Receiver:
        made.append(Receiver())
        return made[-1]

    yield start
    for receiver in made:
        receiver.close()


def told(url: str, **limits: float) -> str | None:
    said = notify(url, EVENT, **{"pause_s": 0.0, "timeout_s": 10.0} | limits)
    for secret in ("hush", "quiet", "T00"):
        assert said is None or secret not in said
    return said


def test_an_event_arrives_as_json(new: Callable[[], Receiver]) -> None:
    receiver = new()
    assert told(receiver.url) is None
    ((path, kind, body),) = receiver.received
    assert path == f"/{SECRET}?token=quiet" and kind == "application/json" and json.loads(body) == EVENT


def test_secrets_are_not_sent(new: Callable[[], Receiver]) -> None:
    receiver = new()
    notify(receiver.url, {"page": "https://me:pa55word@host/x", "password": "open sesame"})
    assert b"pa55word" not in receiver.received[0][2] and b"sesame" not in receiver.received[0][2]


@pytest.mark.parametrize("fault", [500, 503, 429, "drop"])
def test_a_passing_fault_is_tried_again(new: Callable[[], Receiver], fault: int | str) -> None:
    receiver = new()
    receiver.answers = [fault, 204]
    assert told(receiver.url) is None and len(receiver.received) == 2


def test_a_lasting_fault_is_a_warning(new: Callable[[], Receiver]) -> None:
    receiver = new()
    receiver.answers = [500]
    assert told(receiver.url) == "The webhook at 127.0.0.1 was not told: it answers 500."
    assert len(receiver.received) == ATTEMPTS


def test_a_refusal_is_not_tried_again(new: Callable[[], Receiver]) -> None:
    receiver = new()
    receiver.answers = [404]
    said = told(receiver.url)
    assert said is not None and "404" in said and len(receiver.received) == 1


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_no_redirect_is_followed(new: Callable[[], Receiver], status: int) -> None:
    receiver, elsewhere = new(), new()
    receiver.answers, receiver.location = [status], elsewhere.url
    said = told(receiver.url)
    assert said is not None and "redirect" in said
    assert elsewhere.received == [] and elsewhere.got == []


def test_a_server_that_does_not_answer_is_given_up(new: Callable[[], Receiver]) -> None:
    receiver = new()
    receiver.answers = ["hang"]
    said = told(receiver.url, timeout_s=0.2)
    assert said is not None and "no answer in time" in said
    end = time.monotonic() + 30
    while len(receiver.received) < ATTEMPTS and time.monotonic() < end:  # it may read later than it is left
        time.sleep(0.02)
    assert len(receiver.received) == ATTEMPTS


def test_nobody_there_is_a_warning() -> None:
    with socket.socket() as taken:  # nobody listens there, and nobody else can
        taken.bind(("127.0.0.1", 0))
        said = told(f"http://127.0.0.1:{taken.getsockname()[1]}/{SECRET}")
    assert said is not None and "connection refused" in said


def test_a_server_of_another_protocol_is_a_warning() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def answer() -> None:
            for _ in range(ATTEMPTS):
                connection, _ = listening.accept()
                with connection:
                    connection.recv(65536)
                    connection.sendall(f"SSH-2.0-{SECRET}\r\n\r\n".encode())

        thread = threading.Thread(target=answer)
        thread.start()
        said = told(f"http://127.0.0.1:{listening.getsockname()[1]}/{SECRET}")
        thread.join()
    assert said is not None and "no usable answer" in said


def test_the_address_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert webhook_url(None) is None
    monkeypatch.setenv("HOOK", " https://hooks.example.org/services/x?y=1 ")
    assert webhook_url("HOOK") == "https://hooks.example.org/services/x?y=1"


@pytest.mark.parametrize(
    "url",
    [
        None,
        "",
        "hush-hush",
        "file:///etc/hush-hush",
        "ftp://host/hush-hush",
        "https:///hush-hush",
        "http://[hush-hush",
        "http://host:99999/hush-hush",
        "https://me:hush-hush@host/x",
        "https://hush-hush@host/x",
        "https://host/hush-hush and more",
        "https://host/hush-hush\nHost: other",
        "https://höst/hush-hush",
    ],
)
def test_an_address_that_cannot_be_posted_to_is_refused_without_being_shown(
    monkeypatch: pytest.MonkeyPatch, url: str | None
) -> None:
    monkeypatch.delenv("HOOK", raising=False)
    if url is not None:
        monkeypatch.setenv("HOOK", url)
    with pytest.raises(WrongUse) as caught:
        webhook_url("HOOK")
    assert caught.value.code == "setting_invalid"
    assert "HOOK" in str(caught.value) and "hush" not in str(caught.value)
