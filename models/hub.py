"""Published files: find them in the local caches, else download them, else tell where to get them."""

from __future__ import annotations

import logging
import os
import shlex
import socket
import urllib.parse
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path

from models.errors import WrongUse

HUB = "huggingface.co"
# open_clip's file names on the hub, repeated here because importing open_clip takes seconds.
HF_CONFIG_NAME = "open_clip_config.json"
HF_SAFE_WEIGHTS_NAME = "open_clip_model.safetensors"
HF_WEIGHTS_NAME = "open_clip_pytorch_model.bin"


def in_hub_cache(repository: str, file: str, cache: str | None = None) -> Path | None:
    """Look up a file in the Hugging Face cache, safetensors first, without a network round trip."""
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
    """The download cache of Hugging Face's client."""
    try:
        from huggingface_hub.constants import HF_HUB_CACHE
    except ImportError:
        return "~/.cache/huggingface/hub"
    return str(HF_HUB_CACHE)


def hub_file(repository: str, file: str) -> str:
    """The URL of a file of a hub repository."""
    return f"https://{HUB}/{repository}/resolve/main/{file}"


def download(fetch: Callable[[], str], urls: Sequence[str], what: str, use: str) -> Path:
    """Download a weights file if the network is reachable.

    Args:
        fetch: downloads the file and returns its path.
        urls: what to get by hand if it cannot be downloaded; the first one is what ``fetch`` gets.
        what: the model, as the error names it.
        use: what to do with files that were fetched by hand: commands on lines of their own, then a sentence.

    Raises:
        MaskMillError: ``weights_missing``, with commands that can be pasted.
    """
    host = urllib.parse.urlparse(urls[0]).hostname
    reason = "the network cannot be reached"
    if reachable(host or ""):
        try:
            logging.getLogger(__name__).info("fetching the weights of %s from %s", what, urls[0])
            return Path(fetch())
        except Exception as error:  # each HTTP library underneath raises its own exceptions
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    raise WrongUse(
        "weights_missing",
        f"The weights of {what} are not on this machine and could not be fetched: {reason}.",
        f"{fetch_by_hand(urls)}{use}",
    )


def fetch_by_hand(urls: Sequence[str]) -> str:
    """The commands that get files on another machine, each on a line of its own."""
    return "On a machine with a network:\n" + "".join(f"  curl -fLO {shlex.quote(url)}\n" for url in urls)


def put_into(folder: str, file: str) -> str:
    """The command that puts a file from the current folder into another one, on a line of its own."""
    where = shlex.quote(folder)
    return f"  mkdir -p {where} && cp {shlex.quote(file)} {where}/\n"


def same_cache(cache: str | None) -> str:
    """The other way to bring a hub's file here: a line for the end of a remedy."""
    store = cache or hub_cache_folder()
    return f"Or copy {store} from a machine that has them: then the same command finds them.\n"


def reachable(host: str) -> bool:
    """Whether a download is worth trying: without a network the hub client retries for 45 seconds."""
    endpoint = os.environ.get("HF_ENDPOINT")
    if host == HUB and endpoint:
        host = urllib.parse.urlparse(endpoint).hostname or host
    if urllib.request.getproxies():
        return True  # the proxy resolves the name
    try:
        with socket.create_connection((host, 443), timeout=5):
            return True
    except OSError:
        return bool(endpoint)  # a custom endpoint may use another port: let the client try
