"""A Ray session for one run: join a cluster, or start a local one, and shut it down afterwards.

A Ray that is started here belongs to its run alone: it listens on loopback, wants a token that only the
processes of the run have, and keeps its sockets in a folder that only this user can enter.
"""

from __future__ import annotations

import contextlib
import getpass
import logging
import os
import re
import secrets
import shutil
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from models.errors import FailedWork, WrongUse
from pipeline.cluster.nodes import Plan, live_nodes, plan_when_joined
from pipeline.cluster.resources import Compute, plan_compute
from pipeline.cluster.signals import handlers_kept, signals_held
from pipeline.table.lease import RUN_ID_VARIABLE, end_orphans

LOCAL_SLOTS = 8
"""Minimum number of logical CPUs of a local Ray. They are scheduling slots, not cores: on a small machine,
one slot per core would be too few, and the stages would deadlock."""

WORKER_MALLOC = {
    "GLIBC_TUNABLES": ":".join(
        f"glibc.malloc.{name}={value}"
        for name, value in (
            ("arena_max", 1),
            ("hugetlb", 1),
            ("mmap_threshold", 1 << 30),
            ("trim_threshold", 2 << 30),
        )
    )
}
"""Environment of processes that compute on a CPU; the user's own tunables take precedence. By default, glibc
returns the memory of large tensors to the system at once, and the next image faults it in again page by page,
which takes a fifth of the time of a ViT-B/16. All threads share one arena, because glibc returns the heaps of
further arenas whatever the thresholds say, which takes a twentieth. See "Memory Allocation Tunables"
in the glibc manual; ``hugetlb`` needs glibc 2.35."""

RAY_SETTINGS = {
    # Each prestarted worker process costs a core-second, which is a lot on a laptop.
    "RAY_prestart_worker_first_driver": "0",
    "RAY_enable_worker_prestart": "0",
    # Workers of a training must resolve relative paths of samples like the driver.
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    # Ray Train's polling interval, two seconds by default, delays start and end too.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    # The control plane remembers tasks, by default 100,000, a gigabyte; nobody reads them.
    "RAY_task_events_max_num_task_in_gcs": "1000",
}
"""How Ray behaves in a run; the user's own values take precedence."""

WRITTEN_BY_LIBRARIES = {
    "RAY_CLIENT_MODE": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "PYTHONBREAKPOINT": "pdb.set_trace",
    "TOKENIZERS_PARALLELISM": "false",
}
"""Environment variables that Ray and open_clip set while threads run, with the values that they set, or that
mean the same as none."""

REACH_S = 20.0
"""Timeout for connecting to a cluster."""

JOIN_TRIES = 5
"""How often Ray tries to join a cluster that does not let it in; a try takes 1 to 11 s."""

START_TRIES = 3
"""How often a local Ray is started. Ray gives its processes half a minute, too little for a busy machine."""

LONGEST_PARENT = 25
"""Bytes of the folder's path below which a local Ray keeps its sockets. A socket's path has at most 103 bytes
on macOS (107 on Linux), of which Ray and the name of our own folder take 78."""


def joins_cluster(address: str | None) -> bool:
    """Whether ``ray_session`` joins a cluster, given by its argument or by ``RAY_ADDRESS``."""
    return (address or os.environ.get("RAY_ADDRESS")) not in (None, "", "local")


def make_variables(*, verbose: bool = False) -> None:
    """Make the environment variables of a run, those that only later get their values as well.

    A job calls this before it starts threads. In glibc before 2.41, a new variable moves the environment, and
    compiled code (torch, gRPC, the resolver) that looks up a variable in another thread at that moment
    crashes. A variable that exists already is replaced in place.

    Args:
        verbose: let Ray log more than fatal errors.
    """
    # As torch names it when it is imported.
    compiled = {"TORCHINDUCTOR_CACHE_DIR": f"{tempfile.gettempdir()}/torchinductor_{_user()}"}
    for name, value in (WORKER_MALLOC | RAY_SETTINGS | WRITTEN_BY_LIBRARIES | compiled).items():
        os.environ.setdefault(name, value)
    if not verbose:
        # At lower levels, every run prints a warning about the arguments of pool actors.
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    os.environ.setdefault(RUN_ID_VARIABLE, "")


def _user() -> str:
    try:
        return re.sub(r'[\\/:*?"<>|]', "_", getpass.getuser())
    except (KeyError, OSError):  # such as in a container, whose user has no name
        return f"uid_{os.getuid()}"


@contextlib.contextmanager
def ray_session(
    run_id: str,
    *,
    address: str | None,
    verbose: bool,
    notice: Callable[[str], None] = lambda _text: None,
    plan: Plan[Any] = plan_compute,
    begin: Callable[[], object] = lambda: None,
) -> Iterator[Any]:
    """Join or start Ray for one run, and yield the plan for its nodes.

    Every environment variable of the run is made before ``begin``, for the reason that ``make_variables``
    gives.

    Args:
        run_id: set in the environment of every process of the run (``pipeline.table.lease.end_orphans``).
        address: of a cluster; None joins the one in ``RAY_ADDRESS`` (set within ``ray job submit``), else
            starts a local one.
        verbose: show Ray's log.
        notice: called with what the user should know: the cluster that is joined, what the run waits for.
        plan: makes the yielded plan from the nodes.
        begin: called when the environment is complete, before Ray starts: it may start threads.

    Raises:
        MaskMillError: ``cluster_unreachable``; ``ray_failed`` if a local Ray has no place for its sockets;
            ``cluster_too_small`` if too few nodes have joined a cluster after
            ``pipeline.cluster.nodes.NODES_WAIT_S``.
    """
    make_variables(verbose=verbose)
    os.environ[RUN_ID_VARIABLE] = run_id
    with contextlib.ExitStack() as stack:
        if joins_cluster(address):
            stack.enter_context(_variables({"RAY_gcs_server_port_wait_time_s": str(JOIN_TRIES)}))
            begin()
            with signals_held():
                _join(address or os.environ["RAY_ADDRESS"], verbose=verbose, notice=notice)
                stack.callback(_end_ray)
            yield plan_when_joined(plan, notice)
            return
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        stack.enter_context(_private_place())
        begin()
        with signals_held():
            _start(run_id, slots=max(LOCAL_SLOTS, 2 * cores), verbose=verbose, notice=notice)
            stack.callback(_end_ray)
        yield plan(live_nodes(), cores=cores)


@contextlib.contextmanager
def _private_place() -> Iterator[None]:
    """Make Ray listen on loopback, want a token, and work in a folder of its own, which is then removed."""
    folder = _make_folder()
    # Without support for several nodes, which Ray leaves off on macOS and Windows, it takes 127.0.0.1 for its
    # address. By its own address, a dozen ports would be open to the network.
    here = {"RAY_TMPDIR": folder, "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
    if "ray" not in sys.modules:
        # Against other processes of this user, too, such as those that join any Ray they find ("auto"). It
        # stays set afterwards, because Ray reads its token once in a process.
        os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    elif "RAY_AUTH_TOKEN" not in os.environ:
        # This process may have read Ray's file already.
        _narrow_token_file()
    try:
        with _variables(here):
            yield
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _variables(values: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables for a while."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _make_folder() -> str:
    """A new folder with a short path that only this user can enter.

    Raises:
        MaskMillError: ``ray_failed``.
    """
    named = os.environ.get("RAY_TMPDIR")
    parents = [named] if named else [tempfile.gettempdir(), "/tmp"]
    for parent in parents:
        if len(os.fsencode(parent)) <= LONGEST_PARENT:
            with contextlib.suppress(OSError):
                return tempfile.mkdtemp(prefix="mill-", dir=parent)
    raise WrongUse(
        "ray_failed",
        f"Ray has no place for its sockets: {' and '.join(dict.fromkeys(parents))} cannot be written to, or "
        f"have a path of more than {LONGEST_PARENT} bytes, which leaves too little for the names of sockets.",
        "Set RAY_TMPDIR to a folder on a local disk with a short path, such as /var/tmp.",
    )


def _narrow_token_file() -> None:
    """Let nobody else read the token that Ray keeps in its documented place, and makes with mode 0644."""
    path = Path.home() / ".ray" / "auth_token"
    with contextlib.suppress(OSError):
        path.parent.mkdir(mode=0o700, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with open(handle, "w") as file:
                file.write(secrets.token_hex(32))
        path.chmod(0o600)


def _join(address: str, *, verbose: bool, notice: Callable[[str], None]) -> None:
    import ray

    try:
        _reach(address)
        _init({"address": address}, verbose=verbose)
    except Exception as error:
        raise FailedWork(
            "cluster_unreachable",
            f"Ray could not be reached at {address}: {error}",
            "Check --address (or RAY_ADDRESS), or leave it out to run on this machine alone. A cluster that "
            "wants a token needs RAY_AUTH_MODE=token and its RAY_AUTH_TOKEN here.",
        ) from error
    notice(f"joined the Ray at {ray.get_runtime_context().gcs_address}")


def _reach(address: str) -> None:
    """Fail at once if nothing listens at ``host:port``: Ray itself retries for many minutes."""
    import ray.util

    host, _, port = address.removeprefix("ray://").rpartition(":")
    if port.isdigit():
        host = host.strip("[]")
        if host in ("localhost", "127.0.0.1", "::1"):
            host = ray.util.get_node_ip_address()  # which Ray takes instead
        socket.create_connection((host, int(port)), timeout=REACH_S).close()


def _start(run_id: str, *, slots: int, verbose: bool, notice: Callable[[str], None]) -> None:
    import ray

    for tried in range(1, START_TRIES + 1):
        try:
            _init({"address": "local", "num_cpus": slots, "include_dashboard": False}, verbose=verbose)
            return
        except BaseException as error:
            # A start that was interrupted or failed may leave processes that Ray does not know of.
            end_orphans(run_id)
            # Ray raises a plain Exception when its processes take too long to start.
            if not isinstance(error, Exception):
                raise
            if tried == START_TRIES or ray.is_initialized():
                raise FailedWork(
                    "cluster_unreachable",
                    f"Ray could not be started on this machine, {tried} time(s): {error}",
                    "If this machine is busy, try again later; -v shows Ray's own messages.",
                ) from error
            notice("Ray did not start in time; trying again")


def _init(where: Mapping[str, Any], *, verbose: bool) -> None:
    import ray

    level = logging.INFO if verbose else logging.ERROR
    try:
        with contextlib.nullcontext() if verbose else _quiet_stderr(), handlers_kept():
            ray.init(**where, logging_level=level, log_to_driver=verbose)
    except SystemExit as error:  # raised by Ray's own SIGTERM handler
        raise KeyboardInterrupt from error


def _end_ray() -> None:
    import ray

    with signals_held():
        ray.shutdown()


@contextlib.contextmanager
def _quiet_stderr() -> Iterator[None]:
    """Discard writes to standard error, including those of compiled code."""
    sys.stderr.flush()
    saved = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(nowhere)


def worker_precision(compute: Compute) -> str:
    """``models.device.native_precision`` of a worker machine, which may differ from this one."""
    import ray

    @ray.remote(num_cpus=compute.task_cpus, num_gpus=compute.gpus, max_retries=3)
    def ask() -> str:
        from models.device import best_device, native_precision

        return native_precision(best_device())

    answer: str = ray.get(ask.remote())
    return answer
