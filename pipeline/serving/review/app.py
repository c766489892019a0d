"""The server of a review: ``maskmill serve --review``.

A save names the one that it follows, by ``If-Match`` with its entity tag, or ``If-None-Match: *`` for the
first. Of two people who save the same image, the second gets 412 and what the first has said.
"""

from __future__ import annotations

import asyncio
import io
import threading
from collections.abc import Collection
from typing import Annotated

import numpy as np
import numpy.typing as npt
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from PIL import Image
from pydantic import Base64Bytes, BaseModel, ConfigDict, Field, ValidationError

from pipeline.files.documents import first_problem
from pipeline.review.desk import Desk, encode_page_mask, image_name
from pipeline.review.queue import KINDS, Kind
from pipeline.review.saving import Decision, Saved, SavedByAnother
from pipeline.serving.guard import Guard, TrustedHosts, add_errors, client_address, invalid_request
from pipeline.serving.limits import Limits, RateLimiter, Refused, Uploads, bounded
from pipeline.serving.pages import add_page

_DECODED_AT_ONCE = 4
"""Images in memory."""


class SaveRequest(BaseModel):
    """What a person says of an image.

    Attributes:
        decision: accepted, rejected or painted.
        reviewer: a name; it is not checked.
        mask: of what is painted: class ids as 16 bits, little-endian, row by row, gzip, base64.
    """

    model_config = ConfigDict(extra="forbid")

    decision: Decision
    reviewer: Annotated[str, Field(max_length=80)] = ""
    mask: Base64Bytes | None = None


class SavedReply(BaseModel):
    """What is saved of an image."""

    decision: Decision
    reviewer: str
    reviewed: str
    tag: str


class ItemReply(BaseModel):
    """An image of the queue. The id is text: numbers of scripts do not hold 64 bits."""

    id: str
    name: str
    quality: float | None
    reasons: list[dict[str, str]]
    saved: SavedReply | None


class ClassReply(BaseModel):
    """A class: its position is its id."""

    name: str
    color: str


class QueueReply(BaseModel):
    """The queue."""

    title: str
    table: str
    corrections: str
    classes: list[ClassReply]
    ignore_index: int
    reasons: dict[Kind, str]
    items: list[ItemReply]


class SizedReply(BaseModel):
    """One image: its size, the class areas as labelled, and what is saved."""

    id: str
    width: int
    height: int
    segments: list[dict[str, float]]
    saved: SavedReply | None


def create_review_app(
    desk: Desk, limits: Limits | None = None, *, loopback: bool = True, names: Collection[str] = ()
) -> FastAPI:
    """Build the ASGI application of a review.

    Args:
        desk: the queue.
        limits: limits for clients.
        loopback: whether the server listens on loopback only.
        names: host names of the server in addition to ``localhost``.
    """
    limits = limits or Limits()
    app = FastAPI(
        title="MaskMill review",
        description="Accept, reject or paint labels.",
        docs_url=None,
        redoc_url=None,
    )
    app.add_middleware(TrustedHosts, loopback=loopback, names=names)
    app.add_middleware(Guard)
    add_page(app, "pipeline.serving.review", "review", ("review.js", "canvas.js", "drafts.js"))
    _add_reading(app, desk)
    _add_saving(app, desk, limits)
    add_errors(app)

    @app.exception_handler(SavedByAnother)
    async def conflict(_request: Request, error: SavedByAnother) -> Response:
        body = {"code": error.code, "message": error.message, "remedy": error.remedy}
        return JSONResponse(body | {"saved": _saved(error.there).model_dump()}, 412)

    return app


def _add_reading(app: FastAPI, desk: Desk) -> None:
    decoding = threading.BoundedSemaphore(_DECODED_AT_ONCE)

    @app.get("/health")
    async def health() -> dict[str, str]:
        """Whether the server answers."""
        return {"status": "ok"}

    @app.get("/api/review")
    def queue() -> QueueReply:
        """The images, their reasons, and what is saved of them."""
        entries = desk.entries
        saves = desk.saves.read_all(entry.id for entry in entries)
        return QueueReply(
            title=desk.ontology.name,
            table=desk.queue.table,
            corrections=desk.queue.corrections,
            classes=[
                ClassReply(name=name, color=f"#{red:02x}{green:02x}{blue:02x}")
                for name, (red, green, blue) in zip(
                    desk.ontology.names, desk.ontology.palette().tolist(), strict=True
                )
            ],
            ignore_index=desk.ontology.ignore_index,
            reasons=dict(KINDS),
            items=[
                ItemReply(
                    id=str(entry.id),
                    name=image_name(entry.uri),
                    quality=entry.quality,
                    reasons=[reason.model_dump() for reason in entry.reasons],
                    saved=_saved(saves[entry.id]) if entry.id in saves else None,
                )
                for entry in entries
            ],
        )

    @app.get("/api/review/agreement")
    def agreement() -> list[str]:
        """How well each reviewer agrees with the truth, where it is known."""
        return [one.described() for one in desk.agreement()]

    @app.get("/api/review/{image_id}")
    def item(image_id: int) -> SizedReply:
        """One image."""
        row, saved = desk.row(image_id), desk.saves.read(image_id)
        return SizedReply(
            id=str(image_id),
            width=row["width"],
            height=row["height"],
            segments=[
                {name: float(segment[name]) for name in ("class_id", "area", "mean_confidence")}
                for segment in row["segments"]
            ],
            saved=None if saved is None else _saved(saved),
        )

    @app.get("/api/review/{image_id}/image", response_class=Response)
    def image(image_id: int) -> Response:
        """The image, upright, as JPEG."""
        row = desk.row(image_id)
        with decoding:
            return _jpeg(desk.picture(row), quality=92)

    @app.get("/api/review/{image_id}/thumbnail", response_class=Response)
    def thumbnail(image_id: int) -> Response:
        """Labels over the image, small, as JPEG."""
        row, saved = desk.row(image_id), desk.saves.read(image_id)
        with decoding:
            return _jpeg(desk.thumbnail(row, saved), quality=80)

    @app.get("/api/review/{image_id}/mask", response_class=Response)
    def mask(image_id: int, original: bool = False) -> Response:
        """The labels: those that are saved, or ``original``, those of the table. See ``SaveRequest.mask``."""
        row, saved = desk.row(image_id), desk.saves.read(image_id)
        labels = desk.labels(row)
        if not original and saved is not None and saved.mask is not None:
            labels = desk.saves.labels(saved)
        return Response(
            encode_page_mask(labels),
            media_type="application/octet-stream",
            headers={"Content-Encoding": "gzip"},
        )


def _add_saving(app: FastAPI, desk: Desk, limits: Limits) -> None:
    rate = RateLimiter(limits.per_minute, limits.burst)
    uploads = Uploads(limits.uploading_bytes)

    async def body(request: Request) -> bytes:
        rate.take(client_address(request))
        with uploads.one(client_address(request)) as count:
            chunks = bounded(
                request.stream(),
                limits.upload_bytes,
                declared=request.headers.get("content-length"),
                pause=limits.upload_pause,
                count=count,
            )
            try:
                return b"".join([chunk async for chunk in chunks])
            except asyncio.TimeoutError:
                raise Refused(
                    408, "upload_too_slow", "Nothing more of the request arrived.", "Save again."
                ) from None

    @app.put(
        "/api/review/{image_id}",
        responses={412: {"description": "Somebody else has saved it since."}},
        openapi_extra={
            "requestBody": {
                "required": True,
                "content": {"application/json": {"schema": SaveRequest.model_json_schema()}},
            }
        },
    )
    async def save(image_id: int, request: Request) -> SavedReply:
        """Save what a person says of an image."""
        follows = _follows(request)
        if not request.headers.get("content-type", "").startswith("application/json"):
            raise Refused(415, "request_invalid", "The request is not JSON.", "Send a SaveRequest as JSON.")
        try:
            asked = SaveRequest.model_validate_json(await body(request))
        except ValidationError as error:
            raise invalid_request(first_problem(error)) from None
        saved = await asyncio.to_thread(
            desk.save,
            image_id,
            asked.decision,
            asked.mask,
            reviewer=" ".join(asked.reviewer.split()),
            follows=follows,
        )
        return _saved(saved)


def _follows(request: Request) -> str | None:
    """Tag of the save that this one follows; None for the first.

    Raises:
        MaskMillError: 428 if the request does not say.
    """
    match = request.headers.get("if-match")
    if match is not None:
        return match.strip().strip('"')
    if request.headers.get("if-none-match", "").strip() == "*":
        return None
    raise Refused(
        428,
        "request_invalid",
        "The request does not say which save it follows.",
        'Send If-Match: "TAG", or If-None-Match: * for the first.',
    )


def _saved(saved: Saved) -> SavedReply:
    return SavedReply(
        decision=saved.decision, reviewer=saved.reviewer, reviewed=saved.reviewed, tag=saved.tag
    )


def _jpeg(pixels: npt.NDArray[np.uint8], *, quality: int) -> Response:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=quality)
    return Response(buffer.getvalue(), media_type="image/jpeg")
