"""The bundled toy CLIP: its files, and its registration with open_clip.

It is an open_clip ``CLIP`` (ViT with a class token), trained from captions on the procedural toy world
(``jobs/toyclip/pretrain.py``; numbers in ``assets/MODEL_CARD.md``). It knows nothing else.

Its tokenizer is open_clip's ``SimpleTokenizer`` with a *cut* merge table: a word whose merges are all kept is
encoded as with the full table; any other word falls back to shorter pieces, in the end to single bytes. So
every text has an encoding, and no unknown token is needed.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import open_clip

MODEL_NAME = "toyclip"
PRETRAINED = "bundled"

_ASSETS = Path(__file__).resolve().parent / "assets"


def weights_path() -> Path:
    """The bundled weights (safetensors, fp16)."""
    return _ASSETS / f"{MODEL_NAME}.safetensors"


def config_path() -> Path:
    """The open_clip model configuration (JSON)."""
    return _ASSETS / f"{MODEL_NAME}.json"


def config() -> dict[str, Any]:
    """The content of ``config_path``."""
    model_config: dict[str, Any] = json.loads(config_path().read_text(encoding="utf-8"))
    return model_config


def vocabulary_path() -> Path:
    """The cut merge table in open_clip's format (gzipped text)."""
    return _ASSETS / f"{MODEL_NAME}_bpe.txt.gz"


def register() -> None:
    """Register the model with open_clip, so that ``open_clip.create_model("toyclip")`` works; idempotent."""
    import open_clip

    if MODEL_NAME not in open_clip.list_models():
        open_clip.add_model_config(config_path())


def tokenizer() -> open_clip.SimpleTokenizer:
    """open_clip's tokenizer with the cut merge table: P strings to int64 (P, context_length)."""
    import open_clip

    register()
    return open_clip.get_tokenizer(MODEL_NAME, bpe_path=str(vocabulary_path()))


def used_merges(texts: Iterable[str], *, common: int = 0) -> list[tuple[str, str]]:
    """The merges of open_clip's full table that encoding ``texts`` uses, in the table's order.

    Every merge of the full table makes a string that no other merge makes, so the pieces of an encoded text
    identify the merges behind them.

    Args:
        texts: what the cut tokenizer must encode as the full one does.
        common: also keep this many of the table's first merges; with a few thousand, any English word takes
            only a few pieces, and prompts fit the context.
    """
    import open_clip

    full = open_clip.SimpleTokenizer()
    made_by = {first + second: (first, second) for first, second in full.bpe_ranks}
    used = {pair for pair, rank in full.bpe_ranks.items() if rank < common}
    pending = [full.decoder[token] for text in texts for token in full.encode(text)]
    while pending:
        pair = made_by.get(pending.pop())
        if pair is not None and pair not in used:
            used.add(pair)
            pending.extend(pair)
    return sorted(used, key=full.bpe_ranks.__getitem__)


def write_vocabulary(path: Path, merges: Iterable[tuple[str, str]]) -> int:
    """Write a merge table that open_clip's ``SimpleTokenizer`` reads.

    Args:
        path: the file (``.txt.gz``); equal merges give equal bytes.
        merges: pairs, most preferred first.

    Returns:
        The vocabulary size for the model's text configuration.
    """
    lines = [" ".join(pair) for pair in merges]
    # The reader skips the first line; a trailing newline would become an empty token.
    text = "\n".join(["#version: cut from open_clip bpe_simple_vocab_16e6", *lines])
    path.write_bytes(gzip.compress(text.encode("utf-8"), mtime=0))
    single_bytes, specials = 2 * 256, 2
    return single_bytes + len(lines) + specials
