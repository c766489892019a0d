"""The bundled small CLIP: where its files are, and how open_clip gets to know it.

It is an open_clip ``CLIP`` (ViT with a class token) that was trained from captions on the procedural toy
world (``jobs/toyclip/pretrain.py``; numbers in ``assets/MODEL_CARD.md``). It is a toy: it knows nothing else.

Its tokenizer is open_clip's ``SimpleTokenizer`` over a *cut* merge table: a word whose merges were all kept
gets the pieces of the full table, and any other word falls back to shorter pieces and at last to single
bytes. So every text has an encoding, and no unknown token is needed.
"""

from __future__ import annotations

import gzip
from collections.abc import Iterable
from pathlib import Path

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


def vocabulary_path() -> Path:
    """The cut merge table in the format of open_clip's own (gzipped text)."""
    return _ASSETS / f"{MODEL_NAME}_bpe.txt.gz"


def register() -> None:
    """Make ``open_clip.create_model("toyclip")`` possible; a second call does nothing."""
    if MODEL_NAME not in open_clip.list_models():
        open_clip.add_model_config(config_path())


def tokenizer() -> open_clip.SimpleTokenizer:
    """open_clip's tokenizer with the cut merge table and this model's context length.

    Calling it with P strings gives int64 (P, context_length), as with any open_clip tokenizer.
    """
    register()
    return open_clip.get_tokenizer(MODEL_NAME, bpe_path=str(vocabulary_path()))


def used_merges(texts: Iterable[str], *, common: int = 0) -> list[tuple[str, str]]:
    """The merges of open_clip's full table that the encoding of ``texts`` uses, in the table's order.

    Args:
        texts: anything the model shall read as the full tokenizer would.
        common: how many of the table's first merges to keep in any case; with a few thousand, any English
            word is a few pieces long, and prompts fit the context.

    Returns:
        Pairs as in the merge table. Every merge of the full table makes a string that no other one makes,
        so the pieces of an encoded text tell which merges were taken.
    """
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
        path: where to (``.txt.gz``); equal merges give equal bytes.
        merges: pairs, the most preferred first.

    Returns:
        The vocabulary size that the model's text configuration must state.
    """
    lines = [" ".join(pair) for pair in merges]
    # The reader skips the first line; a trailing newline would become an empty token.
    text = "\n".join(["#version: cut from open_clip bpe_simple_vocab_16e6", *lines])
    path.write_bytes(gzip.compress(text.encode("utf-8"), mtime=0))
    single_bytes, specials = 2 * 256, 2
    return single_bytes + len(lines) + specials
