"""Tokenizers of C-RADIO's SigLIP2 and of TIPSv2, whose vocabularies are published beside their weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import open_clip.tokenizer
import torch
from torch import Tensor

from models.clip.published import CONTEXT, TIPS_FILES
from models.errors import WrongUse
from models.hub import download, hub_file, in_hub_cache, same_cache


class Pieces:
    """TIPSv2's: small letters in pieces of a SentencePiece vocabulary, 0 behind them.

    Attributes:
        special: tokens that are added to those of ``encode``.
    """

    special = 0

    def __init__(self, model: Path, context: int) -> None:
        try:
            import sentencepiece
        except ImportError as error:
            raise WrongUse(
                "package_missing",
                "TIPSv2's words are cut by sentencepiece, which is not installed.",
                "pip install sentencepiece",
            ) from error
        self._model = sentencepiece.SentencePieceProcessor(model_file=str(model))
        self._context = context

    def encode(self, text: str) -> list[int]:
        """Tokens of a prompt."""
        return list(self._model.encode(text.lower()))

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """P prompts to int64 (P, context)."""
        tokens = torch.zeros(len(texts), self._context, dtype=torch.int64)
        for row, text in zip(tokens, texts, strict=True):
            found = self.encode(text)[: self._context]
            row[: len(found)] = torch.tensor(found, dtype=torch.int64)
        return tokens


class SigLip2Words:
    """SigLIP2's, by open_clip: canonical text, its tokens and an end, 0 behind them; see ``Pieces``."""

    special = 0  # ``encode`` counts the end

    def __init__(self, config: dict[str, Any]) -> None:
        name = config["hf_tokenizer_name"]
        try:
            self._words = open_clip.tokenizer.HFTokenizer(
                name, context_length=config["context_length"], **config.get("tokenizer_kwargs", {})
            )
        except ImportError as error:
            raise WrongUse(
                "package_missing",
                "SigLIP2's words are cut by transformers, which is not installed.",
                "pip install transformers",
            ) from error
        except (OSError, ValueError) as error:
            raise WrongUse(
                "weights_missing",
                f"The vocabulary {name} is not on this machine and could not be fetched: "
                f"{str(error).splitlines()[0]}",
                same_cache(None),
            ) from error

    def encode(self, text: str) -> list[int]:
        """Tokens of a prompt."""
        return list(self._words.tokenizer(self._words.clean_fn(text)).input_ids)

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """P prompts to int64 (P, context)."""
        tokens: Tensor = self._words(list(texts))
        return tokens


def tokenizer_of(config: dict[str, Any], weights: Path | None) -> Pieces | SigLip2Words:
    """The tokenizer of a model of this package.

    Args:
        config: of its ``WeightSource``.
        weights: its file; TIPSv2's vocabulary may lie beside it.

    Raises:
        MaskMillError: ``package_missing``; ``weights_missing``, with what to get.
    """
    if config["tower"] == "radio":
        return SigLip2Words(config["text_cfg"])
    file, repository = TIPS_FILES[1], config["repository"]
    beside = None if weights is None else weights.with_name(file)
    if beside is not None and beside.is_file():
        return Pieces(beside, config["text_cfg"].get("context_length", CONTEXT))
    found = in_hub_cache(repository, file)
    if found is None:

        def fetch() -> str:
            from huggingface_hub import hf_hub_download

            return hf_hub_download(repository, file)

        use = f"Copy it here, and put it beside the weights file.\n{same_cache(None)}"
        found = download(fetch, [hub_file(repository, file)], f"the vocabulary of {repository}", use)
    return Pieces(found, config["text_cfg"].get("context_length", CONTEXT))
