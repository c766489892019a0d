"""Whether the nodes of a cluster share the disk of the driver's node, and where work on local files runs.

No path tells. So a task on each node looks for landmarks, files that the driver sees. If a node lacks one of
them, work on local files runs on the driver's node alone. Otherwise it runs on any node; as others may join
later, each task then looks again before it works.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from models.errors import FailedWork, MaskMillError, WrongUse
from pipeline.files.fetch import file_version
from pipeline.files.storage import Storage, canonical_uri, is_remote
from pipeline.table.labels import iter_batches
from pipeline.table.lease import refuse_other_holder

NOT_SHARED = "disk_not_shared"
LANDMARKS = 16
"""Files that a node has to find, spread over all."""
ANSWER_S = 60.0
"""A node that has not answered in this time counts as one without the disk."""

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Landmarks:
    """Files by which a task tells whether it sees the driver's disk; picklable. False if there are none.

    Attributes:
        files: path and version (``pipeline.files.fetch.file_version``) of files that stay as they are; any
            file of that name will do if there is no version.
        output: a local output, and the id of the run that holds its lease.
    """

    files: tuple[tuple[str, str | None], ...] = ()
    output: tuple[Storage, str] | None = None

    @classmethod
    def of(cls, places: Iterable[str], *, output: Storage | None = None, run_id: str = "") -> Landmarks:
        """Landmarks for some files, of which only local ones count, and for an output if it is local."""
        local = [place for place in places if not is_remote(place)]
        chosen = [canonical_uri(place) for place in _spread(local, LANDMARKS)]
        known = [(path, file_version(path)) for path in chosen if not is_remote(path)]
        return cls(
            tuple((path, version) for path, version in known if version is not None),
            None if output is None or not output.is_local else (output, run_id),
        )

    @classmethod
    def copies(cls, places: Iterable[str]) -> Landmarks:
        """Landmarks for files whose content is checked elsewhere, so that copies of them will do."""
        return cls(tuple((path, None) for path in map(canonical_uri, places) if not is_remote(path)))

    def and_of(self, places: Iterable[str]) -> Landmarks:
        """These, and those of other files."""
        return replace(self, files=(*self.files, *Landmarks.of(places).files))

    def __bool__(self) -> bool:
        return bool(self.files or self.output)

    def seen(self) -> bool:
        """Whether this process finds all of them."""
        for path, version in self.files:
            found = file_version(path)
            if found is None or version not in (None, found):
                return False
        try:
            if self.output is not None:
                refuse_other_holder(*self.output)
        except MaskMillError:
            return False
        return True

    def require(self) -> None:
        """Raise ``disk_not_shared`` if this process does not find all of them."""
        if not self.seen():
            raise FailedWork(
                NOT_SHARED,
                f"A node does not see the disk of the driver's node: {self.example} is not there as it was.",
                "Finished work is kept: run the same command again, and it uses that disk on its node alone.",
            )

    @property
    def example(self) -> str:
        """One of them, for messages."""
        return self.files[0][0] if self.files else self.output[0].uri if self.output else ""


@dataclass(frozen=True)
class Place:
    """Where tasks that touch local files run.

    Attributes:
        node: id of the driver's node, if they run there alone; else they run on any node.
        landmarks: what each of them has to find first if it may run on any node.
    """

    node: str | None = None
    landmarks: Landmarks = Landmarks()

    def task_options(self, cpus: float) -> dict[str, Any]:
        """Options of Ray for tasks that ask for so many CPUs.

        The driver's node may have none for tasks: there, only their number is bounded.
        """
        if self.node is None:
            return {"num_cpus": cpus}
        from ray.util.placement_group import NODE_ID_LABEL_KEY

        return {"num_cpus": 0, "label_selector": {NODE_ID_LABEL_KEY: self.node}}

    def guarded(self, work: Callable[[T], R]) -> Callable[[T], R]:
        """``work``, which checks the landmarks first if it may run on any node."""
        return _Guarded(work, self.landmarks) if self.node is None and self.landmarks else work


ANYWHERE = Place()


@dataclass(frozen=True)
class _Guarded:
    work: Callable[[Any], Any]
    landmarks: Landmarks

    def __call__(self, argument: Any) -> Any:
        self.landmarks.require()
        return self.work(argument)


def own_cores() -> int:
    """CPUs of the driver's node that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def find_place(
    landmarks: Landmarks, what: str, notice: Callable[[str], None], *, alone: bool = False
) -> Place:
    """Decide where work on local files runs. Needs a running Ray.

    Args:
        landmarks: what all nodes have to see; without any, the work runs on any node.
        what: the work, for ``notice``: "images are read".
        notice: called with what was found, unless there is only one node.
        alone: whether the driver's node does work on local files without the others, whatever they see.

    Raises:
        MaskMillError: ``disk_not_shared`` if not even the driver's node sees them.
    """
    if not landmarks:
        return ANYWHERE
    if alone:
        import ray

        return Place(ray.get_runtime_context().get_node_id())
    here, others, blind = _ask(landmarks)
    if blind:
        unseen = f"{_nodes(blind)} of {len(others)} others cannot see {landmarks.example}"
        notice(f"{what} on this node alone: {unseen}")
        return Place(here)
    if others:
        notice(f"{what} on any node: all of them see {landmarks.example}")
    return Place(landmarks=landmarks)


def require_shared(landmarks: Landmarks, what: str, remedy: str) -> None:
    """Refuse work that runs on other nodes, if they do not see what it needs. Needs a running Ray.

    Args:
        landmarks: what all nodes have to see.
        what: what they are, with a verb: "the labels are".
        remedy: what to do.

    Raises:
        MaskMillError: ``disk_not_shared``.
    """
    blind = _ask(landmarks)[2] if landmarks else ()
    if blind:
        raise WrongUse(
            NOT_SHARED,
            f"{what} on the disk of this machine, which other nodes do not share: {_nodes(blind)} cannot see "
            f"{landmarks.example}.",
            remedy,
        )


def files_of_table(storage: Storage, parts: Sequence[str], *, images: bool) -> list[str]:
    """Some files of a label table, and some of its images, for ``Landmarks.of``.

    Args:
        storage: the folder of the parts.
        parts: their names.
        images: whether images count.
    """
    chosen = _spread(parts, LANDMARKS // 2)
    found = [storage.uri_of(part) for part in chosen]
    for part in chosen if images else ():
        with contextlib.suppress(MaskMillError):  # a damaged part is told by whoever needs it
            batch = next(iter_batches(storage, ["uri"], batch_size=1, names=[part]), None)
            found += [] if batch is None else batch["uri"].to_pylist()
    return found


def _ask(landmarks: Landmarks) -> tuple[str, list[str], list[str]]:
    """Id of the driver's node; addresses of the other nodes that take tasks; of those without the disk."""
    import ray
    from ray.exceptions import RayError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here: str = ray.get_runtime_context().get_node_id()
    others = {
        node["NodeID"]: str(node["NodeManagerAddress"])
        for node in ray.nodes()
        if node["Alive"] and node["Resources"].get("CPU", 0.0) > 0 and node["NodeID"] != here
    }
    # Nested, so that it is pickled by value.
    look = ray.remote(num_cpus=0, max_retries=0)(lambda: landmarks.seen())
    asked = {
        look.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(): node
        for node in (here, *others)
    }
    answered, _ = ray.wait(list(asked), num_returns=len(asked), timeout=ANSWER_S)
    sees = dict.fromkeys(asked.values(), False)
    for answer in answered:
        try:
            sees[asked[answer]] = ray.get(answer)
        except RayError:  # most likely the node was lost
            sees[asked[answer]] = asked[answer] != here
    if not sees[here]:
        raise WrongUse(
            NOT_SHARED,
            f"The node of the cluster that this command joined does not see {landmarks.example}.",
            "Run the command on a node of the cluster that has these files, or give s3://… addresses.",
        )
    return here, list(others.values()), [others[node] for node in others if not sees[node]]


def _nodes(addresses: Sequence[str]) -> str:
    shown = ", ".join(sorted(addresses)[:3]) + (", …" if len(addresses) > 3 else "")
    return f"{len(addresses)} [{shown}]"


def _spread(items: Sequence[T], count: int) -> list[T]:
    """At most ``count`` items, evenly spread."""
    return [items[len(items) * index // count] for index in range(count)] if len(items) > count else [*items]
