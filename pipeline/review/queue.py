"""The queue of a review: which images of a label table a person is to look at, in which order, and why."""

from __future__ import annotations

from typing import Final, Literal

from pydantic import BaseModel, ConfigDict, Field

from models.errors import WrongUse
from pipeline.files.records import find_record, now
from pipeline.files.storage import Storage, canonical_uri, open_storage

QUEUE_FILE: Final = "review.json"
"""Name of a queue in the folder of its table."""
SCHEMA_VERSION: Final = 1
ACCEPTABLE: Final = 0.7
"""Mean IoU with the truth from which it is right to accept labels."""

Kind = Literal["quality", "confidence", "disagree", "floods", "empty", "unlike", "random"]
KINDS: Final[dict[Kind, str]] = {
    "quality": "low quality: some classes were found doubtfully",
    "confidence": "low confidence on the whole",
    "disagree": "two models disagree",
    "floods": "one class covers nearly everything",
    "empty": "nothing is labelled",
    "unlike": "unlike other images of its class",
    "random": "chosen by chance, so that the rest is seen too",
}


class Reason(BaseModel):
    """Why an image is in the queue: a kind of ``KINDS``, and words with its figures."""

    model_config = ConfigDict(frozen=True)

    kind: Kind
    text: str


class Entry(BaseModel):
    """An image of the queue.

    Attributes:
        id: of its row in the table.
        uri: its address.
        quality: of its row, in [0, 1].
        reasons: why it is here.
        known: whether its truth is known: a honeypot. Reviewers are not told.
    """

    model_config = ConfigDict(frozen=True)

    id: int
    uri: str
    quality: float | None = None
    reasons: tuple[Reason, ...] = ()
    known: bool = False


class Queue(BaseModel):
    """What a queue's file says.

    Attributes:
        schema_version: of the file.
        created: UTC, ISO 8601.
        table: canonical URI of the label table.
        corrections: where what people say is kept.
        against: the second table, whose labels were compared; None without one.
        truth: where the truth of honeypots is: a label table, or a folder of masks; None without any.
        acceptable: mean IoU with the truth from which it is right to accept.
        embedding: the CLIP by whose embeddings scenes were spread; empty if there was none.
        seed: of what was drawn.
        entries: the images, in order.
    """

    model_config = ConfigDict(frozen=True)

    schema_version: int = SCHEMA_VERSION
    created: str = Field(default_factory=now)
    table: str
    corrections: str
    against: str | None = None
    truth: str | None = None
    acceptable: float = Field(ACCEPTABLE, ge=0, le=1)
    embedding: str = ""
    seed: int = 0
    entries: tuple[Entry, ...] = ()


def queue_place(place: str) -> tuple[Storage, str]:
    """Folder and name of a queue: of its file, or that in the folder of a table."""
    folder, _, name = canonical_uri(place).rpartition("/")
    if name.endswith(".json"):
        return open_storage(folder or "/"), name
    return open_storage(place), QUEUE_FILE


def find_queue(place: str) -> Queue | None:
    """The queue in a file, or beside a table; None if there is none.

    Raises:
        MaskMillError: ``newer_version``; ``file_damaged`` if it is no queue.
    """
    storage, name = queue_place(place)
    remedy = "Make it anew: maskmill review TABLE --overwrite. Corrections stay."
    return find_record(Queue, storage, name, SCHEMA_VERSION, remedy=remedy)


def read_queue(place: str) -> Queue:
    """The queue in a file, or beside a table.

    Raises:
        MaskMillError: ``input_missing`` without one; as ``find_queue``.
    """
    queue = find_queue(place)
    if queue is None:
        storage, name = queue_place(place)
        raise WrongUse(
            "input_missing",
            f"There is no queue {storage.uri_of(name)}.",
            f"Make one: maskmill review {place}",
        )
    return queue


def write_queue(queue: Queue, place: str) -> str:
    """Write a queue; returns its URI."""
    storage, name = queue_place(place)
    storage.write_json(name, queue.model_dump(mode="json"))
    return storage.uri_of(name)
