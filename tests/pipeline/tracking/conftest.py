from __future__ import annotations

import http.client
import os
import socket
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from benchmarks.faults.mlflow_server import Server


@pytest.fixture(autouse=True)
def spool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A spool of the test's own; MLflow's variables as a user has them who sets none."""
    for name in [name for name in os.environ if name.startswith("MLFLOW_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("MASKMILL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path / "cache" / "tracking"


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database with MLflow's tables, which take seconds to make."""
    from mlflow.tracking import MlflowClient

    path = tmp_path_factory.mktemp("database") / "empty.db"
    MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def sqlite(tmp_path: Path, empty_database: Path) -> str:
    """Tracking URI of an empty database."""
    (tmp_path / "mlruns.db").write_bytes(empty_database.read_bytes())
    return f"sqlite:///{tmp_path}/mlruns.db"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, empty_database: Path) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    (folder / "server.db").write_bytes(empty_database.read_bytes())
    server = Server(folder)
    server.start()
    yield server
    server.kill()


@pytest.fixture
def black_hole() -> Iterator[str]:
    """A server that takes connections and never answers."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen(128)
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"


class LossyProxy:
    """Passes requests on to a server; the first answer to each different request does not come back."""

    def __init__(self, port: int) -> None:
        self.lost: set[tuple[str, str, bytes]] = set()
        lost = self.lost

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: Any) -> None:
                return

            def _forward(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                inner = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
                headers = {key: value for key, value in self.headers.items() if key != "Host"}
                inner.request(self.command, self.path, body, headers)
                answer = inner.getresponse()
                data = answer.read()
                self.close_connection = True
                request = (self.command, self.path, body)
                if request not in lost:
                    lost.add(request)
                    return
                self.send_response(answer.status)
                self.send_header("Content-Type", answer.headers.get("Content-Type", "application/json"))
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _forward

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.uri = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    def __enter__(self) -> LossyProxy:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def lossy_proxy() -> type[LossyProxy]:
    return LossyProxy


@pytest.fixture
def dead_server() -> Iterator[str]:
    """Where nobody listens, and nobody else can."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{taken.getsockname()[1]}"


@pytest.fixture
def stored() -> Callable[..., dict[str, Any]]:
    """All that MLflow has of the one run of an experiment, and that it is one."""
    from mlflow.tracking import MlflowClient

    def read(uri: str, experiment: str, name: str | None = None) -> dict[str, Any]:
        client = MlflowClient(uri)
        identity = client.get_experiment_by_name(experiment).experiment_id
        runs = [run for run in client.search_runs([identity]) if name in (None, run.info.run_name)]
        assert len(runs) == 1, runs
        run = runs[0]

        def files(path: str | None = None) -> list[str]:
            found = []
            for entry in client.list_artifacts(run.info.run_id, path):
                found += files(entry.path) if entry.is_dir else [entry.path]
            return sorted(found)

        return {
            "id": run.info.run_id,
            "status": run.info.status,
            "info": run.info,
            "params": run.data.params,
            "tags": run.data.tags,
            "metrics": run.data.metrics,
            "history": {
                key: [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, key)]
                for key in run.data.metrics
            },
            "datasets": [entry.dataset for entry in run.inputs.dataset_inputs],
            "files": files(),
            "client": client,
        }

    return read
