from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import shutil
import socket
import socketserver
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Annotated, get_args, get_origin, get_type_hints

import boto3
import pyarrow.parquet as pq
import pytest
import yaml

from benchmarks.faults.clusters import Cluster, running_cluster
from benchmarks.faults.object_store import object_store
from jobs.cli import parse
from jobs.submit import VALUED, Submit, job_apart
from models.errors import MaskMillError
from pipeline.cluster.submission import MOST_MB, PACKAGES, attempt_name, job_name, working_directory

Run = Callable[..., subprocess.CompletedProcess[str]]
ROOT = Path(__file__).resolve().parents[2]
LABEL = ("label", "--images", "s3://bucket/photos", "--classes", "cat", "--output", "s3://bucket/pets")


@pytest.mark.parametrize(
    ("given", "job"),
    [
        (("submit", *LABEL), LABEL),
        (("submit", "--no-follow", "--address", "http://h:1", *LABEL), LABEL),
        (("submit", "--env", "label", "--again", *LABEL, "--again"), (*LABEL, "--again")),
        (("submit", "--address=http://h:1", "--", *LABEL), LABEL),
        (("submit", "--status", "label"), ()),
        (("submit",), ()),
    ],
)
def test_the_job_begins_at_the_first_word_that_is_no_option(
    given: tuple[str, ...], job: tuple[str, ...]
) -> None:
    command = parse(given)
    assert isinstance(command, Submit) and command.job == job
    assert command.follow == ("--no-follow" not in given)


def test_other_commands_are_left_alone() -> None:
    assert job_apart(LABEL) == [*LABEL]


def test_every_option_with_a_value_is_known() -> None:
    hints = get_type_hints(Submit, include_extras=True)

    def plain(kind: object) -> object:
        return plain(get_args(kind)[0]) if get_origin(kind) is Annotated else kind

    valued = {
        f"--{field.name.replace('_', '-')}"
        for field in dataclasses.fields(Submit)
        if plain(hints[field.name]) is not bool and field.name != "job"
    }
    assert set(VALUED) == valued


def test_a_name_says_what_is_asked_for() -> None:
    name = job_name(LABEL, "s3://bucket/pets/")
    assert name.startswith("maskmill-label-pets-") and name == job_name([*LABEL], "s3://bucket/pets/")
    assert job_name((*LABEL, "--recipe", "toy"), "s3://bucket/pets/") != name
    assert job_name(("runs",), "").startswith("maskmill-runs-")
    assert [attempt_name(name, number) for number in (1, 2)] == [name, f"{name}-2"]
    long = job_name(("label",), "s3://bucket/" + "Größe " * 100)
    assert len(long) < 80 and long.isascii()


@pytest.mark.slow
def test_the_code_and_the_named_files_travel_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "pets.yaml").write_text("classes: [cat]")
    (tmp_path / "examples").mkdir()
    (tmp_path / "examples" / "cup.png").write_bytes(b"x" * 10)
    files = {"sets/pets.yaml": tmp_path / "pets.yaml", "examples": tmp_path / "examples"}
    with working_directory(files) as (folder, size):
        found = {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}
        assert {path.parts[0] for path in found} == {*PACKAGES, "sets", "examples"}
        assert {Path("jobs/cli.py"), Path("sets/pets.yaml"), Path("examples/cup.png")} <= found
        assert size == sum((folder / path).stat().st_size for path in found)
        assert not any("__pycache__" in path.parts for path in found)
        done = subprocess.run(
            [sys.executable, "-m", "jobs.cli", "recipes", "toy"],
            cwd=folder,
            env={"PYTHONDONTWRITEBYTECODE": "1"},
            capture_output=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
    assert not folder.exists()


def test_the_files_that_a_configuration_names_travel_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nightly").mkdir()
    (tmp_path / "student.yaml").write_text("iterations: 10")
    written = {
        "name": "pets",
        "output": "s3://b/retraining",
        "images": "s3://b/photos",
        "ontology": "classes.yaml",
        "tracking": "https://mlflow.example",
        "label": {"recipe": "teacher.yaml"},
        "models": [
            {"kind": "maskclip-plus", "recipe": "../student.yaml"},
            {"kind": "clipseg", "recipe": "toy"},
        ],
        "evaluation": {"images": "s3://b/t", "truth": "s3://b/m", "ontology": "voc20"},
    }

    def files(*options: str, **changes: object) -> set[str]:
        (tmp_path / "nightly/retrain.yaml").write_text(yaml.safe_dump(written | changes))
        command = parse(["submit", *options, "retrain", "nightly/retrain.yaml"])
        assert isinstance(command, Submit)
        return {*command.files(parse(command.job))}

    with pytest.raises(MaskMillError, match=r"nightly/teacher\.yaml is not a file or folder below"):
        files()
    for name in ("classes", "teacher"):
        (tmp_path / f"nightly/{name}.yaml").write_text("x")
    config = "nightly/retrain.yaml"
    assert files() == {config, "nightly/classes.yaml", "nightly/teacher.yaml", "student.yaml"}
    # An absolute path means nothing there, unless all machines share it.
    inside = str(tmp_path / "nightly/classes.yaml")
    with pytest.raises(MaskMillError, match="is not a file or folder below"):
        files(ontology=inside)
    assert files("--shared-disk", ontology=inside) == {config, "nightly/teacher.yaml", "student.yaml"}
    # What would be written into the job's own folder is refused; so are paths beside the configuration.
    for changes in ({"output": "out"}, {"tracking": "sqlite:///runs.db"}, {"images": "photos"}):
        for options in ((), ("--shared-disk",)):
            with pytest.raises(MaskMillError, match="The cluster does not see"):
                files(*options, **changes)


def test_too_much_does_not_travel(tmp_path: Path) -> None:
    with (tmp_path / "weights.pt").open("wb") as file:
        file.truncate(MOST_MB * 1_000_000)
    with (
        pytest.raises(MaskMillError, match=r"weights\.pt \(100 MB\)") as told,
        working_directory({"weights.pt": tmp_path / "weights.pt"}),
    ):
        pass
    assert told.value.code == "wrong_use"


def test_the_code_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    with pytest.raises(MaskMillError, match="own code"), working_directory({"models": tmp_path / "models"}):
        pass


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("label", "--images", "photos", "--classes", "cat", "--output", "s3://b/out"), "images photos"),
        (("label", "--images", "photos/*.png", "--classes", "cat", "--output", "s3://b/out"), "photos/*.png"),
        (("label", "--images", "s3://b/in", "--classes", "cat", "--output", "out"), "output out"),
        (
            ("--shared-disk", "label", "--images", "/data/in", "--classes", "cat", "--output", "out"),
            "output out",
        ),
        (("evaluate", "--dataset", "voc20", "--root", "photos", "--labels", "s3://b/t"), "root photos"),
        (("benchmark", "maskclip", "--root", "voc20=photos", "--output", "s3://b/o"), "roots photos"),
        (("train", "clipseg", "--labels", "s3://b/t", "--output", "out"), "output out"),
        (("retrain", "retrain.yaml"), "the output "),
        (("retrain", "broken.yaml"), "broken.yaml"),
        (("--include", "/etc/passwd", *LABEL), "/etc/passwd"),
        (("--include", "nowhere", *LABEL), "nowhere"),
        (("--include", ".", *LABEL), "below this one"),
        (("label", *LABEL[1:], "--ontology", "/etc/passwd"), "/etc/passwd"),
        (("serve", "--port", "1"), "it never ends"),
        (("submit", *LABEL), "it is this command"),
        (("--stop", "x", *LABEL), "one of a job, --status ID and --stop ID"),
        (("--stop", "x", "--status", "y"), "one of a job, --status ID and --stop ID"),
        ((), "one of a job, --status ID and --stop ID"),
        (("lable",), "Did you mean label?"),
        (("--env", "NOT_SET_AT_ALL", *LABEL), "NOT_SET_AT_ALL"),
        (("--env", "A=b", *LABEL), "A=b"),
        (("--env", "AWS_SECRET_ACCESS_KEY", *LABEL), "AWS_SECRET_ACCESS_KEY holds a secret"),
        (("--env", "MLFLOW_TRACKING_URI", *LABEL), "MLFLOW_TRACKING_URI holds a secret"),
        ((*LABEL, "--tracking", "https://me:hunter2@mlflow.example"), "command line holds a secret"),
        (("--address", "10.0.0.1:6379", *LABEL), "not the address of a dashboard"),
        (LABEL, "Which cluster?"),
    ],
)
def test_wrong_uses_are_told_before_anything_is_sent(
    maskmill_here: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    (tmp_path / "photos").mkdir()
    for name, output in (("retrain.yaml", "retraining/"), ("broken.yaml", "5")):
        (tmp_path / name).write_text(
            f"name: pets\noutput: {output}\nimages: s3://b/photos\nclasses: cat\n"
            "models: [{kind: maskclip-plus}]\nevaluation: {hold_out: 0.1}\n"
        )
    done = maskmill_here(
        "submit",
        *arguments,
        AWS_SECRET_ACCESS_KEY="hunter2hunter2",
        MLFLOW_TRACKING_URI="https://me:hunter2@mlflow.example",
    )
    assert done.returncode == 2 and said in done.stderr, done.stderr
    assert "hunter2" not in done.stderr + done.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken.yaml", "photos", "retrain.yaml"]


def test_the_jobs_own_parser_checks_the_job(maskmill_here: Run) -> None:
    done = maskmill_here("submit", "--address", "http://127.0.0.1:1", "label", "--images", "s3://b/x")
    assert done.returncode == 2 and "Missing from maskmill label" in done.stderr
    assert "maskmill label" in maskmill_here("submit", "label", "--help").stdout


def test_what_is_no_ray_is_told(maskmill_here: Run) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        done = maskmill_here("submit", "--address", f"http://127.0.0.1:{closed.getsockname()[1]}", *LABEL)
    assert done.returncode == 1 and "cluster_unreachable" in done.stderr and "ray[default]" in done.stderr

    class Other(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"<html>")

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Other)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    done = maskmill_here("submit", "--address", f"http://127.0.0.1:{server.server_port}", *LABEL)
    server.shutdown()
    server.server_close()
    assert done.returncode == 1 and "cluster_unreachable" in done.stderr


@pytest.fixture(scope="module")
def cluster(maskmill_environment: dict[str, str]) -> Iterator[Cluster]:
    """A cluster whose machines reach an object store, and no workers yet."""
    # As on real machines, where the environment of the packages is activated before Ray starts.
    path = {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    with (
        object_store() as store,
        running_cluster(maskmill_environment | path | store, dashboard=True) as running,
    ):
        yield running


class Tunnel:
    """Passes connections on to a dashboard, as ``ray dashboard`` does, and loses them when asked to."""

    def __init__(self, dashboard: str) -> None:
        host, _, port = dashboard.removeprefix("http://").partition(":")
        open_now = self._open = set[socket.socket]()

        def pass_on(source: socket.socket, sink: socket.socket) -> None:
            with contextlib.suppress(OSError):
                while data := source.recv(65536):
                    sink.sendall(data)
            with contextlib.suppress(OSError):
                sink.shutdown(socket.SHUT_RDWR)

        class Handler(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                with socket.create_connection((host, int(port))) as far:
                    open_now.update((self.request, far))
                    back = threading.Thread(target=pass_on, args=(far, self.request), daemon=True)
                    back.start()
                    pass_on(self.request, far)
                    back.join()

        self._server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._server.block_on_close = False
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.address = f"http://127.0.0.1:{self._server.server_address[1]}"

    def lose_connections(self) -> None:
        for connection in [*self._open]:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def tunnel(cluster: Cluster) -> Iterator[Tunnel]:
    opened = Tunnel(cluster.dashboard)
    yield opened
    opened.close()


@pytest.mark.cluster
@pytest.mark.slow
def test_a_job_is_submitted_once_followed_stopped_and_submitted_again(
    cluster: Cluster,
    tunnel: Tunnel,
    toy_images: Path,
    tmp_path: Path,
    maskmill_here: Run,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "classes.yaml").write_text((ROOT / "pipeline/ontology/builtin/toyworld.yaml").read_text())
    output, photos = tmp_path / "table", tmp_path / "photos"
    photos.mkdir()
    for path in sorted(toy_images.iterdir())[:8]:
        shutil.copy(path, photos)
    # A relative file travels; what is absolute is on the disk that all nodes of this machine share.
    job = (
        "--shared-disk", "label", "--images", str(photos), "--ontology", "classes.yaml",
        "--output", str(output), "--recipe", "toy",
    )  # fmt: skip

    def start(*arguments: str, **environment: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "jobs.cli", "submit", *arguments],
            cwd=tmp_path,
            env=cluster.environment | {"RAY_ADDRESS": cluster.dashboard} | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def submit(*arguments: str) -> tuple[int, str, str]:
        done = maskmill_here("submit", *arguments, RAY_ADDRESS=cluster.dashboard)
        return done.returncode, done.stdout, done.stderr

    # The cluster has no worker yet: the job waits, which leaves time to look at it and to stop it.
    status, _, told = submit("--no-follow", *job)
    assert status == 0 and "MB: the code, classes.yaml." in told, told
    name = told.split("Submitted ")[1].split(".\n")[0]
    waiting = "waiting for the cluster's worker nodes"
    with start("--address", tunnel.address, *job) as follower:
        assert follower.stdout is not None
        for line in follower.stdout:
            if waiting in line:
                break
        tunnel.lose_connections()  # it takes up the log where it broke off
        status, said, _ = submit("--status", name)
        assert status == 0 and f"{name}: it runs (" in said and "label --images" in said, said
        status, _, told = submit("--stop", name)
        assert status == 0 and f"{name} was stopped." in told
        rest, told = follower.communicate(timeout=300)
    assert waiting not in rest
    # Whether Ray had already started it when the follower came is a matter of seconds.
    assert re.search(rf"{name} is there already: it (runs|waits to be started) \(", told), told
    assert follower.returncode == 130, told
    assert "Submitted" not in told and f"{name}: it was stopped" in told
    status, said, _ = submit("--status", name)
    assert status == 130 and "it was stopped" in said
    status, _, told = submit("--stop", name)
    assert status == 0 and f"{name} does not run" in told

    cluster.add_worker(cpus=4)
    status, said, told = submit(*job)
    assert status == 0, said + told
    assert f"Submitted {name}-2." in told and f"{name}-2: it has succeeded" in told
    assert "Labelled 8 images" in said
    uris = [
        uri
        for part in (output / "labels").glob("*.parquet")
        for uri in pq.read_table(part)["uri"].to_pylist()
    ]
    assert sorted(uris) == sorted(map(str, photos.iterdir()))

    before = {path: path.stat().st_mtime_ns for path in output.rglob("*")}
    status, said, told = submit(*job)
    assert status == 0 and f"{name}-2 is done: it has succeeded" in told and "Submitted" not in told
    assert "Labelled 8 images" in said  # its log, once more
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*")} == before

    status, said, told = submit("--again", *job)
    assert status == 0 and f"Submitted {name}-3." in told and "Nothing new" in said

    # A job's own exit status, of a job that fails.
    status, said, told = submit("show", "s3://nothing/nothing")
    assert status != 0 and f"it has failed with exit status {status}" in told, said + told

    status, _, told = submit("--status", "nothing-like-it")
    assert status == 2 and "name_unknown" in told
    for token in ({"RAY_AUTH_TOKEN": "0" * 64}, {"RAY_AUTH_MODE": "disabled"}):
        with start(*job, **token) as refused:  # Ray reads its token once in a process
            _, told = refused.communicate(timeout=300)
        assert refused.returncode == 1 and "cluster_unreachable" in told and "Traceback" not in told, told
        assert cluster.environment["RAY_AUTH_TOKEN"] not in told


@pytest.mark.cluster
@pytest.mark.long
def test_the_readme_word_by_word(cluster: Cluster, toy_images: Path, tmp_path: Path) -> None:
    """Its commands, but for a cloud: another address, the bundled model and no download, its own home."""
    section = (ROOT / "README.md").read_text().split("\n## On a cluster\n")[1].split("\n## ")[0]
    blocks = re.findall(r"```sh\n(.*?)```", section, flags=re.DOTALL)
    lines = [line.partition("  #")[0] for block in blocks for line in block.replace("\\\n", "").splitlines()]
    kept = [line for line in lines if not line.startswith(("ray up", "ray dashboard", "RAY_AUTH_MODE"))]
    assert [line.split()[0] for line in kept] == ["ray", "export", "export", "maskmill", "ray"]
    assert "http://127.0.0.1:8265" in kept[2]
    kept = [line.replace("http://127.0.0.1:8265", cluster.dashboard) for line in kept]
    # One worker at least, if the test above did not start it.
    cluster.add_worker(cpus=4)
    store = boto3.client("s3")
    store.create_bucket(Bucket="bucket")
    for path in sorted(toy_images.iterdir())[:4]:
        store.upload_file(str(path), "bucket", f"photos/{path.name}")
    home = cluster.environment | {"HOME": str(tmp_path)}
    token = home.pop("RAY_AUTH_TOKEN")

    def shell(*lines: str) -> subprocess.CompletedProcess[str]:
        script = "\n".join(["set -e", "umask 022", *lines])
        return subprocess.run(
            ["/bin/sh", "-c", script],
            cwd=ROOT,
            env=home,
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )

    done = shell(kept[0])
    file = tmp_path / ".ray/auth_token"
    assert done.returncode == 0 and file.stat().st_mode & 0o777 == 0o600, done.stderr
    file.write_text(token)  # the cluster of this test has one already
    done = shell(*(f"{line} --recipe toy" if "label" in line else line for line in kept[1:]))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Submitted maskmill-label-pets-" in done.stderr
    assert "Labelled 4 images" in done.stdout and "Nothing new" in done.stdout, done.stdout
    parts = store.list_objects_v2(Bucket="bucket", Prefix="pets/labels/")["Contents"]
    assert sum(part["Key"].endswith(".parquet") for part in parts) >= 1
