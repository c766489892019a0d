from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from jobs.serve import entry
from pipeline.serving.limits import Limits
from tests.pipeline.serving.harness import Server, running


@pytest.fixture(scope="session")
def start() -> Iterator[Callable[..., Server]]:
    """Start a server: ``start(entries, limits)``; it ends with the session."""
    with ExitStack() as stack:
        yield lambda entries, limits=None, **options: stack.enter_context(
            running(entries, limits or Limits(per_minute=0), **options)
        )


@pytest.fixture(scope="session")
def toy_decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIPSeg decoder over the toy CLIP; untrained, since only its path matters here."""
    from models.clip.loading import load_clip
    from models.clipseg.decoder import build_clipseg
    from models.clipseg.weights import save_decoder
    from models.settings import ClipSegConfig

    path = tmp_path_factory.mktemp("decoder") / "rd8.safetensors"
    config = ClipSegConfig(reduce_dim=8, heads=2, feedforward=16, extract_layers=(0, 1, 2))
    save_decoder(build_clipseg(load_clip("toyclip", "bundled"), config), path)
    return path


@pytest.fixture(scope="session")
def toy(start: Callable[..., Server], toy_decoder: Path) -> Server:
    """The default, and a CLIPSeg beside it."""
    return start([entry("toy"), entry(f"prompts={toy_decoder}")])
