"""Work in a process of its own, beside this one."""

from __future__ import annotations

import contextlib
import os
import pickle
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.connection import Connection, Pipe
from types import TracebackType
from typing import Any, Generic, TypeVar

from models.errors import MaskMillError

T = TypeVar("T")

_PROGRAM = "import sys; from jobs.apart import main; main(int(sys.argv[1]))"
_NICE = 19
POSSIBLE = os.name == "posix"


class Apart(Generic[T]):
    """A generator function that runs in a process of its own, from now on; what it yields, to iterate once.

    The process stands back behind all others, hears no Ctrl-C, and ends when this context is left, or when it
    has something to say and this process is gone.

    Args:
        work: a module's generator function, called there. What it yields, or raises, comes here as a pickle.
        args: its arguments, as a pickle.
        environment: variables that the process has beside those of this one.

    Raises:
        MaskMillError: ``process_lost``, from the iteration, if the process ends before the work does. Else
            the iteration raises what the work raises.
    """

    def __init__(
        self, work: Callable[..., Iterator[T]], *args: Any, environment: Mapping[str, str] | None = None
    ) -> None:
        self._connection, theirs = Pipe()
        search = os.pathsep.join(filter(None, sys.path))
        with theirs:
            # Not multiprocessing's way, which would run the program of whoever calls this once more.
            self._process = subprocess.Popen(
                [sys.executable, "-c", _PROGRAM, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                env={**os.environ, **(environment or {}), "PYTHONPATH": search},
            )
        self._left = False
        self._connection.send((work, args))

    def __enter__(self) -> Apart[T]:
        return self

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        _error: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        # Who waits for the process, in another thread, hears that it has gone.
        self._left = True
        self._process.kill()
        self._process.wait()

    def __iter__(self) -> Iterator[T]:
        while True:
            try:
                kind, value = self._connection.recv()
            except (EOFError, ConnectionError):
                if self._left:
                    return
                status = self._process.wait()
                raise MaskMillError(
                    "process_lost",
                    "The process that prepares the work was "
                    + (f"killed by signal {-status}." if status < 0 else f"gone, with status {status}."),
                    "If this machine has run out of memory, close something. The same command begins anew.",
                ) from None
            if kind == "end":
                return
            if kind == "error":
                error, told = value
                raise error from _Elsewhere(told)
            yield value


class _Elsewhere(Exception):
    """The traceback of an exception in the other process."""


def main(descriptor: int) -> None:
    """The other process.

    Args:
        descriptor: of its end of the connection.
    """
    os.setpriority(os.PRIO_PROCESS, 0, _NICE)
    # Threads of torch's that wait for each other would keep busy the cores that they wait for.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    with Connection(descriptor) as connection, contextlib.suppress(ConnectionError):
        try:
            work, args = connection.recv()
            for item in work(*args):
                connection.send(("item", item))
            connection.send(("end", None))
        except ConnectionError:  # nobody listens any more
            raise
        except Exception as error:
            connection.send(("error", (_picklable(error), traceback.format_exc())))


def _picklable(error: Exception) -> Exception:
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # whatever its reduction does wrong
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
