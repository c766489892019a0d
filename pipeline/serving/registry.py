"""The interface of all models that the page serves, and a registry that loads them on first use.

Imports no torch: what a model is called and can do is known before it is loaded.

Shapes: H W pixels of the masks.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from models.errors import MaskMillError, WrongUse
from pipeline.labelling.clipseg.pictures import Picture

log = logging.getLogger("maskmill.serve")

State = Literal["idle", "loading", "ready", "failed"]


@dataclass(frozen=True)
class TextPrompt:
    """Words for what to find."""

    text: str


@dataclass(frozen=True)
class ImagePrompt:
    """An example of what to find.

    Attributes:
        name: what to call it in the legend.
        picture: the example.
    """

    name: str
    picture: Picture


Prompt = TextPrompt | ImagePrompt


@dataclass(frozen=True)
class LabelAnswer:
    """One class per pixel: the classes compete.

    Attributes:
        names: by class id. The first ones are the prompts, in their order.
        labels: uint8 or uint16 (H, W) ids.
        confidence: uint8 (H, W), round(255 p) of the chosen class.
        other: id of "none of them", or None.
        colors: "#rrggbb" by id where the model's own classes have some.
    """

    names: tuple[str, ...]
    labels: NDArray[np.uint8] | NDArray[np.uint16]
    confidence: NDArray[np.uint8]
    other: int | None = None
    colors: tuple[str, ...] | None = None


@dataclass(frozen=True)
class HeatAnswer:
    """One probability map per prompt: each prompt is answered by itself, and none may be there.

    Attributes:
        names: of the prompts, in their order.
        heat: uint8 (P, H, W), round(255 p).
    """

    names: tuple[str, ...]
    heat: NDArray[np.uint8]


Answer = LabelAnswer | HeatAnswer


@dataclass(frozen=True)
class ModelInfo:
    """What a model is and takes.

    Attributes:
        name: as the page lists it.
        kind: ``teacher`` (training-free MaskCLIP), ``student`` or ``clipseg``.
        title: one line for people.
        notice: what to know before trusting it; empty if nothing.
        text, image: the kinds of prompt it takes.
        vocabulary: its own classes, used without a prompt; empty if it needs prompts.
        suggestions: words to try.
        context: words that prompts compete with, unless the request names others; empty if they do not
            compete.
        threshold: probability that the page starts with.
    """

    name: str
    kind: Literal["teacher", "student", "clipseg"]
    title: str
    notice: str = ""
    text: bool = True
    image: bool = False
    vocabulary: tuple[str, ...] = ()
    suggestions: tuple[str, ...] = ()
    context: tuple[str, ...] = ()
    threshold: float = 0.0


class ServedModel(Protocol):
    """A loaded model; calls never overlap."""

    def predict(
        self,
        image: NDArray[np.uint8],
        prompts: Sequence[Prompt],
        context: Sequence[str],
        size: tuple[int, int],
    ) -> Answer:
        """Find the prompts.

        Args:
            image: uint8 (h, w, 3) RGB.
            prompts: of the kinds that the model takes; may be empty for a model with a vocabulary.
            context: words that the prompts compete with; ignored where prompts do not compete.
            size: (H, W) of the maps to return.

        Raises:
            MaskMillError: for prompts that it cannot read (``prompt_too_long``).
        """
        ...


@dataclass(frozen=True)
class Entry:
    """A model and how to load it."""

    info: ModelInfo
    load: Callable[[], ServedModel]


class ModelRegistry:
    """Models by name, each loaded in its own thread on first use.

    Args:
        entries: at least one, with different names; the first is the default.

    Raises:
        MaskMillError: ``wrong_use``, ``model_missing``.
    """

    def __init__(self, entries: Sequence[Entry]) -> None:
        self._entries = {entry.info.name: entry for entry in entries}
        if len(self._entries) != len(entries):
            names = [entry.info.name for entry in entries]
            twice = next(name for name in names if names.count(name) > 1)
            raise WrongUse(
                "wrong_use",
                f"Two models are called {twice!r}.",
                "Write --model NAME=SPEC.",
            )
        if not entries:
            raise WrongUse("model_missing", "There is no model to serve.", "Name one with --model.")
        self._loading: dict[str, Future[ServedModel]] = {}
        self._lock = threading.Lock()

    def infos(self) -> list[ModelInfo]:
        """All models, the default first."""
        return [entry.info for entry in self._entries.values()]

    def info(self, name: str) -> ModelInfo:
        """One model.

        Raises:
            MaskMillError: ``model_unknown``.
        """
        if name not in self._entries:
            raise WrongUse(
                "model_unknown",
                f"There is no model {name[:100]!r} here.",
                f"Use one of {', '.join(self._entries)}.",
            )
        return self._entries[name].info

    def state(self, name: str) -> tuple[State, BaseException | None]:
        """The state of a model, and the error if loading failed."""
        with self._lock:
            future = self._loading.get(name)
        if future is None:
            return "idle", None
        if not future.done():
            return "loading", None
        error = future.exception()
        return ("ready", None) if error is None else ("failed", error)

    def load(self, name: str) -> Future[ServedModel]:
        """Start loading unless that is under way or done; a failed load is tried again.

        Raises:
            MaskMillError: ``model_unknown``.
        """
        self.info(name)
        with self._lock:
            future = self._loading.get(name)
            if future is not None and not (future.done() and future.exception()):
                return future
            fresh = self._loading[name] = Future()
        entry = self._entries[name]

        def work() -> None:
            try:
                fresh.set_result(entry.load())
            except BaseException as error:  # whoever waits has to learn of it
                known = isinstance(error, MaskMillError)
                log.error("The model %s could not be loaded: %s", name, error, exc_info=not known)
                fresh.set_exception(error)

        # A daemon, so that a hanging download does not keep the server from ending.
        threading.Thread(target=work, name=f"load {name}", daemon=True).start()
        return fresh


def unclaimed(words: Sequence[str], prompts: Sequence[Prompt]) -> tuple[str, ...]:
    """The context words that no prompt mentions: "red ladybug" removes "ladybug" and "ladybugs".

    Keeps the order and drops duplicates.
    """
    spoken = [f" {prompt.text.casefold()} " for prompt in prompts if isinstance(prompt, TextPrompt)]

    def said(word: str) -> bool:
        forms = {word, word.removesuffix("s"), f"{word}s"}
        return any(f" {form} " in text for form in forms for text in spoken)

    return tuple(word for word in dict.fromkeys(words) if not said(word.casefold()))
