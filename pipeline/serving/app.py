"""The server: a page and the small API behind it.

Why FastAPI and not Gradio: Gradio is a large dependency that loads fonts and scripts from other servers and
phones home by default, and its page needs a new request for every change of threshold or opacity. Here the
maps are sent once and the browser does the rest; the page is five files in this folder. FastAPI's own
documentation pages load from a CDN, so only ``/openapi.json`` is served.

Nothing is written to disk; uploads stay in memory for the duration of their request.
"""

from __future__ import annotations

import asyncio
import base64
import io
import math
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from functools import cache
from typing import Annotated, Any

import numpy as np
from fastapi import FastAPI, Request
from fastapi.responses import Response
from numpy.typing import NDArray
from PIL import Image
from pydantic import Field, ValidationError
from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from models.errors import MaskMillError, WrongUse
from pipeline.files import images
from pipeline.files.images import ImageError
from pipeline.labelling.clipseg.pictures import as_picture
from pipeline.ontology.palette import palette
from pipeline.serving.guard import Guard, TrustedHosts, add_errors, client_address, invalid_request
from pipeline.serving.limits import (
    Gate,
    Limits,
    RateLimiter,
    Refused,
    Uploads,
    bounded,
)
from pipeline.serving.pages import add_page
from pipeline.serving.registry import (
    Answer,
    HeatAnswer,
    ImagePrompt,
    LabelAnswer,
    ModelInfo,
    ModelRegistry,
    Prompt,
    ServedModel,
    TextPrompt,
)
from pipeline.serving.schemas import (
    PREVIEW_FORM,
    SEGMENT_FORM,
    ErrorReply,
    LegendReply,
    ModelReply,
    ModelsReply,
    PromptRequest,
    SegmentReply,
    SegmentRequest,
)
from pipeline.toyworld import scenes as toyworld

SAMPLE_SEED, SAMPLE_SIZE = 2026, 256
LONGEST_SIDE = 16_384
"""Of a result, in pixels."""
SAMPLES = (0, 1, 10, 43, 40, 51)
"""Toy scenes offered on the page. Together they show every class; the toy CLIP was not trained on them."""


class _InMemoryParser(MultiPartParser):
    """Starlette's parser, kept from writing files above 1 MB to disk."""

    spool_max_size = 0  # unlimited: the whole body is bounded


class _Server:
    """State shared by the routes."""

    def __init__(self, registry: ModelRegistry, limits: Limits, loopback: bool) -> None:
        self.registry = registry
        self.limits = limits
        self.loopback = loopback
        self.rate = RateLimiter(limits.per_minute, limits.burst)
        self.gate = Gate(limits.waiting + 1)
        self.uploads = Uploads(limits.uploading_bytes)
        # One thread: calls of a model must not overlap, and two threads would only share the cores.
        self.worker = ThreadPoolExecutor(1, thread_name_prefix="segment")

    async def form(self, request: Request) -> FormData:
        """Read the multipart form of a request, within the limits.

        Takes no place at the gate: a client that stalls would keep others from the model.
        """
        limits = self.limits
        self.rate.take(client_address(request))
        self.gate.check()
        if not request.headers.get("content-type", "").startswith("multipart/form-data"):
            raise Refused(
                415,
                "form_missing",
                "The request is not a multipart form.",
                "Send the image as the part 'image'.",
            )
        try:
            with self.uploads.one(client_address(request)) as count:
                parser = _InMemoryParser(
                    request.headers,
                    bounded(  # type: ignore[arg-type]  # typed as a generator; an iterator is enough
                        request.stream(),
                        limits.upload_bytes,
                        declared=request.headers.get("content-length"),
                        pause=limits.upload_pause,
                        count=count,
                    ),
                    max_files=1 + 2 * limits.examples,
                    max_fields=4,
                    max_part_size=2**20,
                )
                return await asyncio.wait_for(parser.parse(), limits.upload_seconds)
        except asyncio.TimeoutError:
            raise Refused(
                408,
                "upload_too_slow",
                f"The upload took longer than {limits.upload_seconds:g} s, or nothing of it arrived for "
                f"{limits.upload_pause:g} s.",
                "Send a smaller image.",
            ) from None
        except MultiPartException as error:
            raise Refused(
                400, "form_invalid", f"The form cannot be read: {error.message}", "Send a multipart form."
            ) from None

    async def run(self, request: Request, work: Callable[[], Any]) -> Any:
        """Run work in the worker thread, unless the client disconnects before it starts."""
        future = self.worker.submit(work)
        waiting = asyncio.wrap_future(future)
        while not (await asyncio.wait({waiting}, timeout=0.25))[0]:
            if await request.is_disconnected() and future.cancel():
                raise Refused(499, "client_gone", "The client did not wait.", "Send the request again.")
        return waiting.result()

    async def model(self, name: str) -> ServedModel:
        """A model, loaded on first use."""
        future = self.registry.load(name)
        # Never cancelled: other requests may wait for it too.
        await asyncio.wait({asyncio.wrap_future(future)}, timeout=self.limits.load_seconds)
        if not future.done():
            raise Refused(
                503,
                "model_loading",
                f"The model {name} is still being loaded.",
                "Try again in a few seconds.",
                retry_after=2,
            )
        error = future.exception()
        if error is not None:
            raise self.load_failure(name, error)
        return future.result()

    def load_failure(self, name: str, error: BaseException) -> Refused:
        """The error for a model that could not be loaded."""
        if isinstance(error, MaskMillError) and self.loopback:
            return Refused(500, error.code, error.message, error.remedy)
        # Do not reveal paths and settings of this machine to the network.
        return Refused(
            500,
            "model_failed",
            f"The model {name} could not be loaded.",
            "The reason is in the log of the server.",
        )

    def parse(self, form: FormData) -> SegmentRequest:
        """Parse the ``request`` part and check it against the limits."""
        text = form.get("request", "{}")
        if not isinstance(text, str):
            raise invalid_request("the part 'request' is a file; send it as text")
        try:
            asked = SegmentRequest.model_validate_json(text or "{}")
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(str(part) for part in first["loc"])
            raise invalid_request(f"{place + ': ' if place else ''}{first['msg']}") from None
        limits = self.limits
        words = [prompt.text for prompt in asked.prompts if prompt.text is not None]
        for count, most, what in (
            (len(asked.prompts), limits.prompts, "prompts"),
            (len(asked.prompts) - len(words), limits.examples, "example images"),
            (len(asked.context or ()), limits.context_words, "context words"),
        ):
            if count > most:
                raise WrongUse(
                    "prompt_invalid",
                    f"The request has {count} {what}; at most {most} are taken.",
                    "Leave some out.",
                )
        named = [prompt.name for prompt in asked.prompts if prompt.name is not None]
        for word in (*words, *named, *(asked.context or ())):
            if not word.strip():
                raise WrongUse("prompt_invalid", "A prompt is empty.", "Write what to look for.")
            if len(word) > limits.prompt_length:
                raise WrongUse(
                    "prompt_invalid",
                    f"A prompt has {len(word)} characters; at most {limits.prompt_length} are taken.",
                    "Shorten it.",
                )
        if len({_clean(word) for word in words}) != len(words):
            raise WrongUse("prompt_invalid", "A prompt is there twice.", "Leave one out.")
        return asked

    def check(self, info: ModelInfo, asked: SegmentRequest) -> None:
        """Refuse kinds of prompts that the model does not accept."""
        if not asked.prompts and not info.vocabulary:
            raise WrongUse("prompt_invalid", "There is no prompt.", "Write what to look for.")
        if any(prompt.image is not None for prompt in asked.prompts) and not info.image:
            raise WrongUse(
                "model_unsupported",
                f"{info.name} takes words, and no example images.",
                "Write what to look for, or choose a CLIPSeg model.",
            )

    def segment(
        self, info: ModelInfo, model: ServedModel, asked: SegmentRequest, parts: dict[str, bytes]
    ) -> SegmentReply:
        """Decode, predict and encode; runs in the worker thread."""
        image = self.decode(parts, "image")
        prompts = [self.prompt(prompt, parts) for prompt in asked.prompts]
        context = info.context if asked.context is None else [_clean(word) for word in asked.context]
        height, width = image.shape[:2]
        shrink = min(1.0, math.sqrt(self.limits.result_pixels / (height * width)))
        # A long, thin image keeps its short side of a pixel; browsers draw no longer sides.
        size = (
            min(LONGEST_SIDE, max(1, round(height * shrink))),
            min(LONGEST_SIDE, max(1, round(width * shrink))),
        )
        answer = model.predict(image, prompts, context, size)
        maps, legend = _encoded(answer)
        return SegmentReply(
            model=info.name,
            kind="heat" if isinstance(answer, HeatAnswer) else "labels",
            width=size[1],
            height=size[0],
            image_width=width,
            image_height=height,
            legend=legend,
            maps=maps,
        )

    def prompt(self, asked: PromptRequest, parts: dict[str, bytes]) -> Prompt:
        """Decode the images of a prompt."""
        if asked.text is not None:
            return TextPrompt(_clean(asked.text))
        assert asked.image is not None, "checked with the request"
        example = self.decode(parts, asked.image)
        mask = None if asked.mask is None else self.decode(parts, asked.mask)
        return ImagePrompt(_clean(asked.name or "example"), as_picture(example, mask))

    def decode(self, parts: dict[str, bytes], name: str) -> NDArray[np.uint8]:
        """Decode an image of the form."""
        if name not in parts:
            raise WrongUse(
                "image_invalid", f"The form has no file {name[:100]!r}.", "Send the image as that part."
            )
        try:
            return images.decode(parts[name], max_pixels=self.limits.image_pixels)
        except ImageError as error:
            which = "" if name == "image" else f"{name}: "
            remedy = {
                "too_large": "Scale it down.",
                "unsupported_format": "Convert it to JPEG or PNG.",
                "truncated": "Fetch or save the file again: its end is missing.",
            }.get(error.code, "Send a JPEG, PNG, WebP, AVIF, GIF, TIFF or BMP file.")
            raise WrongUse(
                error.code, f"{which}{images.ERROR_CODES[error.code]} ({error.message}).", remedy
            ) from None


def create_app(
    registry: ModelRegistry,
    limits: Limits | None = None,
    *,
    loopback: bool = True,
    names: Collection[str] = (),
) -> FastAPI:
    """Build the ASGI application.

    Args:
        registry: the models.
        limits: limits for clients.
        loopback: whether the server listens on loopback only; decides which ``Host`` headers are valid, and
            how much clients learn about a model that cannot be loaded.
        names: host names of the server in addition to ``localhost``.
    """
    limits = limits or Limits()
    server = _Server(registry, limits, loopback)

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        yield
        server.worker.shutdown(wait=False, cancel_futures=True)

    app = FastAPI(
        title="MaskMill",
        description="Masks from words and example images.",
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
    )
    app.add_middleware(TrustedHosts, loopback=loopback, names=names)
    app.add_middleware(Guard)
    add_page(app, "pipeline.serving", "page", ("page.js", "masks.js", "example.js"))
    _add_samples(app)
    errors: dict[int | str, dict[str, Any]] = {
        status: {"model": ErrorReply} for status in (400, 403, 408, 413, 415, 429, 500, 503)
    }

    @app.get("/health")
    async def health() -> dict[str, Any]:
        """Whether the server answers, and which models are loaded."""
        return {
            "status": "ok",
            "models": {info.name: registry.state(info.name)[0] for info in registry.infos()},
        }

    @app.get("/api/models")
    async def models() -> ModelsReply:
        """The models, their state, and the limits."""
        bounds = ("upload_bytes", "image_pixels", "prompts", "examples", "context_words", "prompt_length")
        return ModelsReply(
            models=[_described(server, info) for info in registry.infos()],
            palette=_colors(limits.prompts),
            limits={name: getattr(limits, name) for name in bounds},
        )

    @app.post("/api/models/{name}/load", status_code=202, responses=errors)
    async def load(name: str, request: Request) -> ModelReply:
        """Start loading a model, so that the first image does not wait for it."""
        server.rate.take(client_address(request))
        registry.load(name)
        return _described(server, registry.info(name))

    @app.post(
        "/api/preview",
        responses={200: {"content": {"image/png": {}}}, **errors},
        response_class=Response,
        openapi_extra=PREVIEW_FORM,
    )
    async def preview(request: Request) -> Response:
        """Convert an image that browsers cannot show (such as TIFF) to PNG."""
        parts = await _read_parts(await server.form(request))
        with server.gate.enter():
            # Only decodes, so it need not wait for the model's thread.
            data = await asyncio.to_thread(lambda: _png(server.decode(parts, "image")))
        return Response(data, media_type="image/png")

    @app.post("/api/segment", responses=errors, openapi_extra=SEGMENT_FORM)
    async def segment(request: Request) -> SegmentReply:
        """Find prompts in an image."""
        form = await server.form(request)
        asked = server.parse(form)
        parts = await _read_parts(form)
        info = registry.info(asked.model if asked.model is not None else registry.infos()[0].name)
        server.check(info, asked)
        with server.gate.enter():
            model = await server.model(info.name)
            reply = await server.run(request, lambda: server.segment(info, model, asked, parts))
        return reply

    add_errors(app)
    _document(app)
    return app


def _add_samples(app: FastAPI) -> None:
    @cache
    def scene(number: int) -> toyworld.Scene:
        return toyworld.scene(SAMPLE_SEED, SAMPLES[number], SAMPLE_SIZE)

    @app.get("/api/samples")
    def samples() -> list[dict[str, Any]]:
        """Toy scenes to try: their URLs and classes."""
        listed = []
        for number in range(len(SAMPLES)):
            ids, areas = np.unique(scene(number).labels, return_counts=True)
            order = sorted(zip(ids, areas, strict=True), key=lambda pair: -pair[1])
            seen = [
                toyworld.CLASSES[i] for i, area in order if area > toyworld.VISIBLE_SHARE * SAMPLE_SIZE**2
            ]
            listed.append({"url": f"/api/samples/{number}.png", "classes": seen})
        return listed

    @app.get("/api/samples/{number}.png", response_class=Response)
    def sample(number: Annotated[int, Field(ge=0, lt=len(SAMPLES))]) -> Response:
        """A toy scene as PNG."""
        return Response(_png(scene(number).image), media_type="image/png")


def _document(app: FastAPI) -> None:
    """Add to OpenAPI the one schema that no route declares."""
    plain = app.openapi

    def complete() -> dict[str, Any]:
        schema = plain()
        own = SegmentRequest.model_json_schema(ref_template="#/components/schemas/{model}")
        schemas = schema.setdefault("components", {}).setdefault("schemas", {})
        schemas.update(own.pop("$defs", {}))
        schemas["SegmentRequest"] = own
        return schema

    app.openapi = complete  # type: ignore[method-assign]


def _described(server: _Server, info: ModelInfo) -> ModelReply:
    state, error = server.registry.state(info.name)
    told = None
    if error is not None:
        refused = server.load_failure(info.name, error)
        told = ErrorReply(code=refused.code, message=refused.message, remedy=refused.remedy)
    return ModelReply(
        name=info.name,
        kind=info.kind,
        title=info.title,
        notice=info.notice,
        text=info.text,
        image=info.image,
        vocabulary=list(info.vocabulary),
        suggestions=list(info.suggestions),
        context=list(info.context),
        threshold=info.threshold,
        state=state,
        error=told,
    )


def _encoded(answer: Answer) -> tuple[list[str], list[LegendReply]]:
    colors: Sequence[str] = _colors(len(answer.names))
    maps: list[NDArray[Any]]
    other = None
    if isinstance(answer, LabelAnswer):
        # Browsers decode only 8 bits.
        maps = [answer.confidence, (answer.labels & 255).astype(np.uint8)]
        if len(answer.names) > 256:
            maps.append((answer.labels >> 8).astype(np.uint8))
        other = answer.other
        colors = answer.colors or colors
    else:
        maps = list(answer.heat)
    legend = [
        LegendReply(name=name, color=color, other=index == other)
        for index, (name, color) in enumerate(zip(answer.names, colors, strict=True))
    ]
    return [base64.b64encode(_png(one)).decode() for one in maps], legend


def _png(array: NDArray[Any]) -> bytes:
    buffer = io.BytesIO()
    # Fast rather than small: it usually goes over loopback.
    Image.fromarray(array).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def _colors(count: int) -> list[str]:
    return [f"#{r:02x}{g:02x}{b:02x}" for r, g, b in palette([None] * count)]


def _clean(text: str) -> str:
    return " ".join(text.split())


async def _read_parts(form: FormData) -> dict[str, bytes]:
    """Read the files of a form, by part name."""
    parts = {name: await part.read() for name, part in form.multi_items() if isinstance(part, UploadFile)}
    await form.close()
    return parts
