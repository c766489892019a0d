"""Work in a process of its own, beside this one."""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.connection import Connection, Pipe
from types import TracebackType
from typing import Any, Generic, TypeVar

from models.errors import FailedWork, MaskMillError

T = TypeVar("T")

# Not what lies in the working directory, which "-c" would put before all else.
_PROGRAM = (
    "import sys; sys.path = [p for p in sys.path if p]; from jobs.apart import main; main(int(sys.argv[1]))"
)
_NICE = 19

POSSIBLE = os.name == "posix"
"""Whether this system has what ``Apart`` needs."""


class Apart(Generic[T]):
    """A generator function in a process of its own, from when this context is entered.

    Iterate, once, over what it yields. The process has the lowest priority, hears no Ctrl-C, and ends with
    this context, or when it has something to say and this process is gone.

    Args:
        work: a module's generator function, called there. What it yields, or raises, comes here as a pickle.
        args: its arguments, as a pickle.
        environment: variables that the process has beside those of this one.

    Raises:
        MaskMillError: ``labelling_failed``, from the iteration, if the process ends before the work does.
        Else
            the iteration raises what the work raises.
    """

    def __init__(
        self, work: Callable[..., Iterator[T]], *args: Any, environment: Mapping[str, str] | None = None
    ) -> None:
        self._order = (work, args)
        self._environment = dict(environment or {})

    def __enter__(self) -> Apart[T]:
        self._left = False
        self._connection, theirs = Pipe()
        search = os.pathsep.join(map(os.path.abspath, sys.path))
        with theirs:
            # Not multiprocessing's way, which would run the program of whoever calls this once more.
            self._process = subprocess.Popen(
                [sys.executable, "-c", _PROGRAM, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                env={**os.environ, **self._environment, "PYTHONPATH": search},
            )
        with contextlib.suppress(ConnectionError):  # then the iteration tells
            self._connection.send(self._order)
        return self

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        _error: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        self._left = True
        if self._process.poll() is None:
            # Who waits for it, in another thread, hears that it has gone.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def __iter__(self) -> Iterator[T]:
        with self._connection:
            while True:
                try:
                    kind, value = self._connection.recv()
                except (EOFError, ConnectionError):
                    if self._left:
                        return
                    raise _lost(self._process.wait()) from None
                if kind == "item":
                    yield value
                    continue
                self._process.wait()
                if kind == "error":
                    error, told = value
                    raise error from _Elsewhere(told)
                return


def _lost(status: int) -> MaskMillError:
    if status == -signal.SIGKILL:
        how, remedy = "killed", "If this machine has run out of memory, close something."
    else:
        how, remedy = f"gone, with status {status}", "See what it printed, above."
    return FailedWork(
        "labelling_failed",
        f"The process that prepares the work was {how}.",
        f"{remedy} The same command begins anew.",
    )


class _Elsewhere(Exception):
    """The traceback of an exception in the other process."""

    def __str__(self) -> str:
        return f"\n\n{self.args[0]}"


class _NobodyListens(Exception):
    """The process that asked is gone."""


def main(descriptor: int) -> None:
    """The other process.

    Args:
        descriptor: of its end of the connection.
    """
    os.set_inheritable(descriptor, False)  # or who is started here would keep the connection open
    os.setpriority(os.PRIO_PROCESS, 0, _NICE)
    # Threads of torch's that wait for each other would keep busy the cores that they wait for.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    connection = Connection(descriptor)

    def say(kind: str, value: Any = None) -> None:
        try:
            connection.send((kind, value))
        except ConnectionError as error:
            raise _NobodyListens from error

    with connection, contextlib.suppress(_NobodyListens, EOFError):
        work, args = connection.recv()
        try:
            for item in work(*args):
                say("item", item)
        except _NobodyListens:
            raise
        except Exception as error:
            say("error", (_picklable(error), traceback.format_exc()))
        else:
            say("end")


def _picklable(error: Exception) -> Exception:
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # whatever its reduction does wrong
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
