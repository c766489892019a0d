from __future__ import annotations

import contextlib
import functools
import io
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from PIL import Image

from benchmarks.faults.object_store import FaultyStore, changed_environment, faulty_object_store, object_store
from jobs.cli import main
from pipeline.toyworld import scenes as toyworld

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = dict(os.environ)
"""As it was before any test changed it: fixtures may stand when ``maskmill_environment`` is made."""


@pytest.fixture(scope="session")
def toy_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """64 scenes of the toy world as PNG files, 96 px."""
    folder = tmp_path_factory.mktemp("toy")
    scenes, _, _ = toyworld.generate(7, 64, 96)
    for index, scene in enumerate(scenes):
        Image.fromarray(scene).save(folder / f"scene_{index:03d}.png")
    return folder


@pytest.fixture(scope="session")
def maskmill_environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Environment of the command: the project importable, text cache of its own, nothing tracked."""
    return ENVIRONMENT | {
        "PYTHONPATH": str(ROOT),
        "MASKMILL_CACHE": str(tmp_path_factory.mktemp("cache")),
        "RAY_ADDRESS": "",
        "MLFLOW_TRACKING_URI": "off",
        "PYTHONFAULTHANDLER": "1",  # a crash leaves its stacks in the test's report
    }


@pytest.fixture(scope="session")
def maskmill(maskmill_environment: dict[str, str]) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run the command as a user does, in a process of its own."""

    def run(
        *arguments: object, timeout: float = 900, cores: int | None = None, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        kept = sorted(os.sched_getaffinity(0))[:cores] if cores else None
        return subprocess.run(
            [sys.executable, "-m", "jobs.cli", *map(str, arguments)],
            cwd=ROOT,
            env=maskmill_environment | environment,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
            preexec_fn=(lambda: os.sched_setaffinity(0, kept)) if kept else None,
        )

    return run


@pytest.fixture(scope="session")
def maskmill_here(
    maskmill_environment: dict[str, str],
) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run the command in this process, which has imported already what takes seconds to import."""

    def run(*arguments: object, **more: str) -> subprocess.CompletedProcess[str]:
        given = [*map(str, arguments)]
        out, err = io.StringIO(), io.StringIO()
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        with (
            changed_environment(maskmill_environment | more),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
        ):
            try:
                main(given)
            except SystemExit as end:
                status = end.code
            finally:
                for number, handler in handlers.items():
                    signal.signal(number, handler)
        assert isinstance(status, int)
        return subprocess.CompletedProcess(given, status, out.getvalue(), err.getvalue())

    return run


@pytest.fixture(scope="session")
def maskmill_own_ray(
    maskmill_here: Callable[..., subprocess.CompletedProcess[str]],
) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run the command in this process, on a Ray that it starts itself."""
    # Ray reads its token once in a process. A run makes one if Ray is not imported yet, and then later tests
    # could not join the cluster that they share.
    import ray  # noqa: F401

    return maskmill_here


@pytest.fixture(scope="session")
def maskmill_joined(
    maskmill_here: Callable[..., subprocess.CompletedProcess[str]], shared_ray: str
) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run the command in this process, on a cluster that is there already."""
    return functools.partial(maskmill_here, RAY_ADDRESS=shared_ray)


@pytest.fixture
def s3() -> Iterator[dict[str, str]]:
    """An object store on loopback; the environment that reaches it."""
    with object_store() as environment:
        yield environment


@pytest.fixture
def faulty_s3(s3: dict[str, str]) -> Iterator[FaultyStore]:
    """The object store behind a server that can be told to fail; the environment reaches it through that."""
    with faulty_object_store(s3) as (store, environment):
        s3.update(environment)
        yield store
