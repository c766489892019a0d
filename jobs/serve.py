"""``maskmill serve``: a page that shows what models find in an image, or on which people review labels."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from rich.console import Console
from tyro.conf import arg

from jobs.options import Flag, Maybe, Repeated
from models.errors import WrongUse, did_you_mean
from pipeline.labelling.clipseg.model import THRESHOLD, ClipSegWeights
from pipeline.labelling.recipes import RECIPES, LabelRecipe, load_recipe
from pipeline.ontology.ontology import Ontology, default_background
from pipeline.ontology.reading import load_ontology
from pipeline.serving.limits import Limits, is_loopback
from pipeline.serving.registry import Entry, ModelInfo, ModelRegistry
from pipeline.trained.clipseg import is_trained

if TYPE_CHECKING:
    from fastapi import FastAPI

    from pipeline.serving.registry import ServedModel

PORT = 7860
DEFAULT_MODELS = ("toy",)
_TOY_NOTICE = (
    "Toy weights: {name} knows the procedural toy world and nothing else. It runs without a download; its "
    "masks of real photographs mean nothing."
)
_RANDOM_NOTICE = "Random weights: {name} has learned nothing, its masks mean nothing."


@dataclass(frozen=True, kw_only=True)
class Serve:
    """Serve a page on this machine that shows what models find in an image, or on which people review labels.

    Attributes:
        review: serve this queue, made by maskmill review: its file, or the table that it lies beside; people
            accept, reject or paint, by keys, mouse or touch, and what they say is saved as corrections.
        models: a recipe (name or YAML file), the folder or URI of a student or of a trained CLIPSeg, or
            CLIPSeg weights (.pth, .safetensors, a folder in Hugging Face's layout, clipseg:HUB-NAME); NAME=
            sets its name on the page; may be repeated: the first is the page's default. Default: toy, which
            works offline.
        clip: MODEL:PRETRAINED of the CLIP under CLIPSeg decoder files; default: what the file says, or the
            paper's.
        host: address to listen on; 0.0.0.0 opens the server to the network, without a password.
        port: port to listen on; 0: any free one; default: 7860, or any free one if that is taken.
        allow_hosts: another host name of this server, or *.DOMAIN; may be repeated. Requests for other names
            are refused with 400 (addresses and localhost are fine).
        per_minute: images that one client may send per minute; 0: no limit.
        upload_mb: largest request in MiB.
        verbose: log every request.
    """

    review: Annotated[Maybe[str], arg(metavar="QUEUE|TABLE")] = None
    models: Annotated[Repeated, arg(name="model", metavar="[NAME=]SPEC")] = ()
    clip: Maybe[str] = None
    host: str = "127.0.0.1"
    port: Maybe[int] = None
    allow_hosts: Annotated[Repeated, arg(name="allow-host")] = ()
    per_minute: int = 120
    upload_mb: int = 32
    verbose: Flag = False

    def run(self, console: Console | None = None) -> int:
        """Serve until Ctrl-C; see ``serve``."""
        return serve(self, console)


def serve(job: Serve, console: Console | None = None) -> int:
    """Serve until Ctrl-C.

    Raises:
        MaskMillError: as ``entry``; ``wrong_use``.
    """
    if job.per_minute < 0 or job.upload_mb < 1:
        raise WrongUse(
            "wrong_use", "--per-minute and --upload-mb are positive.", "See maskmill serve --help."
        )
    for name in job.allow_hosts:
        if "*" in name.removeprefix("*.") and name != "*":
            raise WrongUse(
                "wrong_use",
                f"--allow-host {name} is not a host name.",
                "Give a name such as studio.local, or *.example.org for all of a domain.",
            )
    limits = Limits(per_minute=job.per_minute, upload_bytes=job.upload_mb * 2**20)
    console = console or Console()
    loopback = is_loopback(job.host)
    names = (*job.allow_hosts, job.host)
    if job.review is not None:
        app, lines = _review(job, limits, loopback=loopback, names=names)
    else:
        registry = ModelRegistry([entry(spec, clip=job.clip) for spec in job.models or DEFAULT_MODELS])

        from pipeline.serving.app import create_app

        app = create_app(registry, limits, loopback=loopback, names=names)
        lines = [line for info in registry.infos() for line in _described(info)]

    from pipeline.serving.server import make_server

    listener = listen(job.host, job.port)
    logging.basicConfig(format="%(levelname)s %(message)s")
    port = listener.getsockname()[1]
    with listener:
        _announce(console, lines, job, port, loopback=loopback)
        with contextlib.suppress(KeyboardInterrupt):  # uvicorn raises it after its shutdown
            make_server(app, limits, verbose=job.verbose).run(sockets=[listener])
    console.print("Stopped.")
    return 0


def _review(
    job: Serve, limits: Limits, *, loopback: bool, names: tuple[str, ...]
) -> tuple[FastAPI, list[str]]:
    """The application of a review, and what to say of it."""
    if job.models or job.clip:
        raise WrongUse(
            "wrong_use", "--review serves labels, and --model serves models.", "Serve them one by one."
        )
    from pipeline.review.queue import read_queue

    queue = read_queue(str(job.review))

    from pipeline.review.desk import open_desk
    from pipeline.serving.review.app import create_review_app

    desk = open_desk(queue)
    app = create_review_app(desk, limits, loopback=loopback, names=names)
    count = len(desk.entries)
    return app, [
        f"{count:,} image{'' if count == 1 else 's'} of {queue.table} to review",
        f"  What people say is saved in {queue.corrections}",
    ]


def _described(info: ModelInfo) -> list[str]:
    return [f"{info.name}: {info.title}", *([f"  {info.notice}"] if info.notice else [])]


def entry(spec: str, *, clip: str | None = None) -> Entry:
    """Make a registry entry from ``SPEC`` or ``NAME=SPEC`` (see ``Serve.models``).

    Loads nothing, but detects faults that show without loading.

    Raises:
        MaskMillError: ``name_unknown``, ``weights_missing``; as ``load_recipe``, ``read_student_record`` and
            ``read_clipseg_record``.
    """
    name, separator, source = spec.partition("=")
    if not separator:
        name, source = "", spec
    name, source = name.strip(), os.path.expanduser(source.strip())
    path = Path(source)
    if source.startswith("clipseg:"):
        return _clipseg(name or source.rpartition("/")[2], source.removeprefix("clipseg:"), clip)
    remote = "://" in source
    if (remote or path.is_dir()) and is_trained(source):
        return _clipseg(name or source.rstrip("/").rpartition("/")[2], source, clip)
    if remote or (path / "student.json").is_file():
        return _student(name, source if remote else str(path))
    if path.suffix in (".pth", ".safetensors") or (path / "config.json").is_file():
        if not path.exists():
            raise WrongUse(
                "weights_missing", f"There is no file {source}.", "Name the weights of a CLIPSeg decoder."
            )
        return _clipseg(name or path.stem, str(path), clip)
    if path.is_dir():
        raise WrongUse(
            "name_unknown",
            f"{source} is a folder without student.json, clipseg.json or config.json.",
            "Name the output of maskmill train, or a CLIPSeg folder in Hugging Face's layout.",
        )
    if source not in RECIPES and path.suffix not in (".yaml", ".yml"):
        raise WrongUse(
            "name_unknown",
            f"There is no model {source}: it is neither a recipe nor a folder or weights file.",
            f"{did_you_mean(source, RECIPES)}Name the output of maskmill train, CLIPSeg weights "
            f"(.pth, .safetensors), clipseg:HUB-NAME, or a recipe: {', '.join(RECIPES)}.",
        )
    return _teacher(name, load_recipe(source))


def _teacher(name: str, recipe: LabelRecipe) -> Entry:
    toy = recipe.model == "toyclip"
    name = name or recipe.name
    toyworld = load_ontology("toyworld")
    words = toyworld.names if toy else default_background()
    context: dict[str, Any] = {"name": "context", "classes": list(words)}
    if toy:
        context["templates"] = toyworld.templates
    info = ModelInfo(
        name=name,
        kind="teacher",
        title=f"MaskCLIP, no training: {recipe.model}",
        notice=_notice(name, recipe.model, recipe.pretrained),
        suggestions=words if toy else (),
        context=words,
    )

    def load() -> ServedModel:
        from pipeline.serving.served import load_teacher

        return load_teacher(recipe, Ontology.from_dict(context))

    return Entry(info, load)


def _student(name: str, source: str) -> Entry:
    from pipeline.trained.student import read_student_record

    record = read_student_record(source)
    name = name or record.name
    names = record.ontology.names
    info = ModelInfo(
        name=name,
        kind="student",
        title=f"Student of MaskCLIP+ with {len(names)} classes",
        notice=_notice(name, str(record.text.get("model")), record.text.get("pretrained")),
        vocabulary=names,
        suggestions=names,
        context=names,
    )

    def load() -> ServedModel:
        from pipeline.serving.served import load_student

        return load_student(source)

    return Entry(info, load)


def _clipseg(name: str, source: str, clip: str | None) -> Entry:
    weights = ClipSegWeights(source, clip)
    model, pretrained = weights.known_clip() or ("", None)
    info = ModelInfo(
        name=name,
        kind="clipseg",
        title=f"CLIPSeg over {model}" if model else "CLIPSeg",
        notice=_notice(name, model, pretrained),
        image=True,
        suggestions=load_ontology("toyworld").names if model == "toyclip" else (),
        threshold=THRESHOLD,
    )

    def load() -> ServedModel:
        from pipeline.labelling.clipseg.prompting import Finder
        from pipeline.serving.served import load_clipseg

        return load_clipseg(Finder(weights))

    return Entry(info, load)


def _notice(name: str, model: str, pretrained: str | None) -> str:
    if (pretrained or "").startswith("random:"):
        return _RANDOM_NOTICE.format(name=name)
    return _TOY_NOTICE.format(name=name) if model == "toyclip" else ""


def listen(host: str, port: int | None) -> socket.socket:
    """A listening socket; see ``Serve.port``."""
    if port is not None and not 0 <= port <= 65_535:
        raise WrongUse("wrong_use", f"{port} is not a port.", "Choose one from 1024 to 65535, or 0.")
    for attempt in [PORT, 0] if port is None else [port]:
        try:
            return _bind(host, attempt)
        except PermissionError as error:
            raise WrongUse(
                "wrong_use",
                f"Port {attempt} needs privileges that this user does not have.",
                "Choose a port above 1023.",
            ) from error
        except OSError as error:
            taken = getattr(error, "errno", None) == errno.EADDRINUSE
            if taken and port is None:
                continue
            if taken:
                raise WrongUse(
                    "wrong_use", f"Port {port} is in use.", "Choose another --port, or leave it out."
                ) from error
            raise WrongUse(
                "wrong_use",
                f"Cannot listen on {host}, port {attempt}: {error}.",
                "Use an address of this machine: 127.0.0.1 for this machine only, 0.0.0.0 for all.",
            ) from error
    raise AssertionError("some port is always free")


def _bind(host: str, port: int) -> socket.socket:
    found = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    family, kind, protocol, _, address = found[0]
    listener = socket.socket(family, kind, protocol)
    try:
        # Without this, a port stays unusable for a minute after each run.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        # Listen at once: with SO_REUSEADDR two sockets can bind to one port, but only one can listen.
        listener.listen(128)
    except BaseException:
        listener.close()
        raise
    return listener


def _announce(console: Console, lines: list[str], job: Serve, port: int, *, loopback: bool) -> None:
    def say(text: str, **style: Any) -> None:
        console.print(text, soft_wrap=True, highlight=False, markup=False, **style)

    for line in lines:
        say(line)
    shown = job.host if loopback else (socket.gethostname() if _everywhere(job.host) else job.host)
    if _everywhere(job.host) or not loopback:
        say(
            "Warning: this server is open to the network and has no password. Anyone who can reach it "
            f"can {'use its models' if job.review is None else 'see and correct these labels'}.",
            style="yellow",
        )
    if job.port is None and port != PORT:
        say(f"Port {PORT} is in use; this is another one.")
    bracketed = f"[{shown}]" if ":" in shown else shown
    say(f"Open in a browser: http://{bracketed}:{port}/    (Ctrl-C stops the server)")


def _everywhere(host: str) -> bool:
    return host in ("0.0.0.0", "::", "[::]", "")
