"""The routes of a page: its HTML, its style after that of all pages, and its scripts."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files

from fastapi import FastAPI
from fastapi.responses import Response


def add_page(app: FastAPI, package: str, name: str, scripts: Sequence[str]) -> None:
    """Serve ``NAME.html`` at ``/``, with ``NAME.css`` and the scripts beside it.

    Args:
        app: where the routes are added.
        package: whose folder has the files.
        name: of the page.
        scripts: names of files of JavaScript.
    """
    _add(app, "/", "text/html", _text(package, f"{name}.html"))
    style = _text("pipeline.report", "base.css") + "\n" + _text(package, f"{name}.css")
    _add(app, f"/{name}.css", "text/css", style)
    for script in scripts:
        _add(app, f"/{script}", "text/javascript", _text(package, script))


def _text(package: str, file: str) -> str:
    return (files(package) / file).read_text(encoding="utf-8")


def _add(app: FastAPI, path: str, kind: str, body: str) -> None:
    async def serve() -> Response:
        return Response(body, media_type=kind)

    app.get(path, include_in_schema=False)(serve)
