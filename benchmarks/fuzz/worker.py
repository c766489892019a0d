"""The subprocess that makes and tries inputs, and the runner's hold on it."""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import random
import select
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from benchmarks.fuzz.kind import kind_of, outcome_of

ROOT = Path(__file__).resolve().parents[2]
START_SECONDS = 120
"""For imports, and the start of a server."""


@dataclass(frozen=True)
class Result:
    """What an input did.

    Attributes:
        outcome: in a word or two.
        fault: what was wrong with it, else empty.
        memory_mb: the largest resident memory of the subprocess so far.
    """

    outcome: str
    fault: str = ""
    memory_mb: float = 0.0


def random_of(seed: int, module: str, number: int) -> random.Random:
    """The generator of an input."""
    return random.Random(f"{seed}/{module}/{number}")


def serve(module: str, seed: int, folder: Path, answers: int) -> None:
    """Try the inputs whose numbers come over stdin; answer each with a line of JSON to a file descriptor."""
    faulthandler.enable()
    kind = kind_of(module)(folder)
    with os.fdopen(answers, "w") as out, contextlib.closing(kind):
        print(json.dumps({"outcome": "ready"}), file=out, flush=True)
        for line in sys.stdin:
            rng = random_of(seed, module, int(line))
            data = kind.make(rng)
            try:
                result = Result(outcome_of(kind, data, rng))
            except Exception as error:
                result = Result(type(error).__name__, traceback.format_exc()[-4000:])
            answer = {"outcome": result.outcome, "fault": result.fault, "memory_mb": kind.peak_mb()}
            print(json.dumps(answer), file=out, flush=True)


class Worker:
    """A subprocess of a kind; a context manager that ends it.

    Args:
        module: of the kind.
        seed: of the inputs.
    """

    def __init__(self, module: str, seed: int) -> None:
        self._scratch = tempfile.TemporaryDirectory(prefix="maskmill-fuzz-", ignore_cleanup_errors=True)
        folder = Path(self._scratch.name)
        (folder / "work").mkdir()
        self._errors = folder / "stderr"
        reading, writing = os.pipe()
        command = [
            sys.executable, "-m", "benchmarks.fuzz", "--module", module, "--seed", str(seed), "--worker",
            str(folder / "work"), "--answers", str(writing),
        ]  # fmt: skip
        with self._errors.open("wb") as errors:
            self._process = subprocess.Popen(
                command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL, stderr=errors, pass_fds=[writing], start_new_session=True,
            )  # fmt: skip
        os.close(writing)
        self._reading = reading
        self._pending = b""
        ready = self._answer(START_SECONDS)
        if ready.outcome != "ready":
            self.close()
            raise RuntimeError(f"the subprocess for {module} did not start: {ready.fault}")

    def try_input(self, number: int, seconds: float) -> Result:
        """Try an input; a fault if the subprocess crashes or takes longer."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(b"%d\n" % number)
            self._process.stdin.flush()
        return self._answer(seconds)

    def _answer(self, seconds: float) -> Result:
        end = time.monotonic() + seconds
        while b"\n" not in self._pending:
            left = end - time.monotonic()
            if left <= 0 or not select.select([self._reading], [], [], left)[0]:
                return Result("hang", f"no answer in {seconds:g} s")
            part = os.read(self._reading, 1 << 16)
            if not part:
                status = self._process.wait()
                name = signal.Signals(-status).name if status < 0 else f"status {status}"
                return Result(f"crash {name}", self._errors.read_text(errors="replace")[-4000:])
            self._pending += part
        line, _, self._pending = self._pending.partition(b"\n")
        return Result(**json.loads(line))

    @property
    def alive(self) -> bool:
        """Whether the subprocess still runs."""
        return self._process.poll() is None

    def close(self) -> None:
        """End the subprocess and what it started."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(5)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        os.close(self._reading)
        self._scratch.cleanup()

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
