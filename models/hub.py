"""Files that others publish: looked for in this machine's caches, then fetched, else said where to get."""

from __future__ import annotations

import logging
import os
import socket
import urllib.parse
import urllib.request
from collections.abc import Callable
from pathlib import Path

from open_clip.constants import HF_SAFE_WEIGHTS_NAME, HF_WEIGHTS_NAME

from models.errors import WrongUse

HUB = "huggingface.co"


def in_hub_cache(repository: str, file: str, cache: str | None = None) -> Path | None:
    """A file in the Hugging Face cache, asked for without a network round trip."""
    try:
        from huggingface_hub import try_to_load_from_cache
    except ImportError:
        return None
    names = [file]
    if file == HF_WEIGHTS_NAME:
        names = [HF_SAFE_WEIGHTS_NAME, file]
    elif file.endswith((".bin", ".pth")):
        names = [f"{file[:-4]}.safetensors", file]
    for name in names:
        cached = try_to_load_from_cache(repository, name, cache_dir=cache)
        if isinstance(cached, str):
            return Path(cached)
    return None


def hub_cache_folder() -> str:
    """Where Hugging Face's client keeps what it fetches."""
    try:
        from huggingface_hub.constants import HF_HUB_CACHE
    except ImportError:
        return "~/.cache/huggingface/hub"
    return str(HF_HUB_CACHE)


def download(
    fetch: Callable[[], str], place: str, store: str, what: str, use: str, *, otherwise: str = ""
) -> Path:
    """Fetch a file, if there is a network.

    Args:
        fetch: does it; returns the path.
        place: URL, perhaps with words behind it.
        store: where other machines keep it.
        what: it is the weights of.
        use: what to do with a file that was fetched by hand.
        otherwise: another way out, a sentence.

    Raises:
        MaskMillError: ``weights_missing``.
    """
    host = HUB if place.startswith(f"https://{HUB}") else urllib.parse.urlparse(place).hostname
    reason = "the network cannot be reached"
    if reachable(host or ""):
        try:
            logging.getLogger(__name__).info("fetching the weights of %s from %s", what, place)
            return Path(fetch())
        except Exception as error:  # every HTTP library on the way has its own exceptions
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    raise WrongUse(
        "weights_missing",
        f"The weights of {what} are not on this machine and could not be fetched: {reason}.",
        f"Get {place} on another machine and {use}; or copy that machine's {store} to the same place here."
        f"{otherwise and ' '}{otherwise}",
    )


def reachable(host: str) -> bool:
    """Whether asking makes sense: without a network the hub client retries for three quarters of a minute."""
    endpoint = os.environ.get("HF_ENDPOINT")
    if host == HUB and endpoint:
        host = urllib.parse.urlparse(endpoint).hostname or host
    if urllib.request.getproxies():
        return True  # names are then resolved by the proxy
    try:
        with socket.create_connection((host, 443), timeout=5):
            return True
    except OSError:
        return bool(endpoint)  # an own endpoint may sit on another port: let the client try
