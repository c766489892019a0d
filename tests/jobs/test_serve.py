from __future__ import annotations

import io
import json
import os
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
from rich.console import Console

from jobs import serve
from jobs.serve import PORT, Serve, entry
from models.errors import MaskMillError
from tests.pipeline.trained.test_student import toy_student

ROOT = Path(__file__).resolve().parents[2]
FINDER = {
    "schema_version": 1, "kind": "clipseg", "created": "", "model": "clipseg", "config": {},
    "clip": {"model": "toyclip", "pretrained": "bundled"}, "fingerprint": "", "hugging_face": False,
    "recipe": {}, "data": {}, "metrics": {}, "training": {}, "versions": {},
}  # fmt: skip


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of things that can be served, and of some that cannot."""
    folder = tmp_path_factory.mktemp("serve")
    toy_student(folder / "run")
    (folder / "mine.yaml").write_text("base: toy\npd_threshold: 0.5\n")
    (folder / "rd64.pth").write_bytes(b"")
    (folder / "hub").mkdir()
    (folder / "hub" / "config.json").write_text("{}")
    (folder / "photos").mkdir()
    (folder / "finder").mkdir()
    (folder / "finder" / "clipseg.json").write_text(json.dumps(FINDER))
    return folder


@pytest.mark.parametrize(
    ("spec", "name", "kind", "toy", "image"),
    [
        ("toy", "toy", "teacher", True, False),
        ("maskclip", "maskclip", "teacher", False, False),
        ("big = maskclip", "big", "teacher", False, False),
        ("{}/mine.yaml", "mine", "teacher", True, False),
        ("{}/run", "run", "student", True, False),
        ("s={}/run", "s", "student", True, False),
        ("file://{}/run", "run", "student", True, False),
        ("{}/rd64.pth", "rd64", "clipseg", False, True),
        ("{}/hub", "hub", "clipseg", False, True),
        ("{}/finder", "finder", "clipseg", True, True),
        ("file://{}/finder/", "finder", "clipseg", True, True),
        ("clipseg:CIDAS/clipseg-rd64-refined", "clipseg-rd64-refined", "clipseg", False, True),
    ],
)
def test_specs(places: Path, spec: str, name: str, kind: str, toy: bool, image: bool) -> None:
    info = entry(spec.format(places)).info
    assert (info.name, info.kind, bool(info.notice), info.image) == (name, kind, toy, image)
    assert info.text and (info.vocabulary != ()) == (kind == "student")
    assert (info.context == ()) == (kind == "clipseg")  # its prompts do not compete


@pytest.mark.parametrize(
    ("spec", "name", "kind"),
    [
        ("f=~/finder", "f", "clipseg"),
        ("~/rd64.pth", "rd64", "clipseg"),
        ("s = ~/run", "s", "student"),
        ("m=~/mine.yaml", "m", "teacher"),
    ],
)
def test_a_home_folder_in_a_spec(
    places: Path, monkeypatch: pytest.MonkeyPatch, spec: str, name: str, kind: str
) -> None:
    monkeypatch.setenv("HOME", str(places))  # a shell expands no ~ behind =
    info = entry(spec).info
    assert (info.name, info.kind) == (name, kind)


@pytest.mark.parametrize(
    ("spec", "code"),
    [
        ("tpy", "name_unknown"),
        ("{}/photos", "name_unknown"),
        ("{}/none.pth", "weights_missing"),
        ("{}/none.yaml", "setting_invalid"),
        ("file://{}/photos", "name_unknown"),
    ],
)
def test_wrong_specs(places: Path, spec: str, code: str) -> None:
    with pytest.raises(MaskMillError) as caught:
        entry(spec.format(places))
    assert caught.value.code == code


@pytest.mark.parametrize(
    ("clip", "expected"),
    [
        (None, ("ViT-B-16-quickgelu", "openai")),
        ("ViT-B-16:laion2b_s34b_b88k", ("ViT-B-16", "laion2b_s34b_b88k")),
        ("ViT-B-16:random:0", ("ViT-B-16", "random:0")),
        ("hf-hub:org/name", ("hf-hub:org/name", None)),
        ("toyclip:bundled", ("toyclip", "bundled")),
    ],
)
def test_the_clip_beneath_a_decoder_is_named(
    places: Path, clip: str | None, expected: tuple[str, str | None]
) -> None:
    info = entry(str(places / "rd64.pth"), clip=clip).info
    assert info.title == f"CLIPSeg over {expected[0]}" and info.threshold == 0.3
    notice = {"random:0": "Random weights", "bundled": "Toy weights"}.get(expected[1] or "", "")
    assert info.notice.startswith(notice) and bool(info.notice) == bool(notice)


@pytest.mark.parametrize("name", ["a*b", "*local", "*.*.org"])
def test_a_host_name_that_is_none(name: str) -> None:
    with pytest.raises(MaskMillError) as caught:
        Serve(allow_hosts=(name,)).run(Console(file=io.StringIO()))
    assert caught.value.code == "wrong_use" and name in caught.value.message


@pytest.mark.slow
def test_two_models_of_one_name_and_ports() -> None:
    with pytest.raises(MaskMillError) as caught:
        Serve(models=("toy", "toy")).run(Console(file=io.StringIO()))
    assert caught.value.code == "wrong_use"
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        with pytest.raises(MaskMillError) as caught:
            Serve(port=other.getsockname()[1]).run(Console(file=io.StringIO()))
        assert caught.value.code == "wrong_use"
    for host, port in (("203.0.113.9", 0), ("no.such.host.invalid", 0), ("127.0.0.1", 70_000)):
        with pytest.raises(MaskMillError) as caught:
            Serve(host=host, port=port).run(Console(file=io.StringIO()))
        assert caught.value.code == "wrong_use"


def test_another_port_where_the_usual_one_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        monkeypatch.setattr(serve, "PORT", other.getsockname()[1])
        with serve.listen("127.0.0.1", None) as listener:
            assert listener.getsockname()[1] not in (0, PORT, other.getsockname()[1])


@pytest.mark.slow
@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_it_says_where_it_is_serves_and_ends_when_asked(stop: signal.Signals) -> None:
    public = stop == signal.SIGTERM
    code = (
        "import sys\nfrom jobs.serve import Serve\n"
        "from pipeline.cluster.signals import interrupt_on_signals\n"
        "interrupt_on_signals()\n"
        f"sys.exit(Serve(host={'0.0.0.0' if public else '127.0.0.1'!r}, port=0).run())"
    )
    environment = os.environ | {"PYTHONUNBUFFERED": "1", "COLUMNS": "80"}
    server = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        assert server.stdout is not None
        said = ""
        while "Open in a browser" not in said:
            line = server.stdout.readline()
            assert line, server.stderr.read() if server.stderr else ""
            said += line
        assert "Toy weights" in said and ("has no password" in said) == public
        port = said.partition("http://")[2].partition("/")[0].rpartition(":")[2]
        # It listens already: a request waits until the server takes it.
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=120) as answer:
            assert b'"toy":"idle"' in answer.read()
        server.send_signal(stop)
        out, err = server.communicate(timeout=120)
        assert server.returncode == 0 and "Stopped." in out and "Traceback" not in err
    finally:
        server.kill()
        server.communicate()
