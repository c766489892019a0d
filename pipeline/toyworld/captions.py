"""The toy world's classes, the words that describe them, and captions.

Captions are as careless as on the web: they omit things, sometimes use colour or pattern words, and sometimes
just say "something red".
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

STUFF: tuple[str, ...] = ("grass", "water", "sand", "brick", "sky", "wood")
THINGS: tuple[str, ...] = (
    "ladybug",
    "zebra",
    "sunflower",
    "leaf",
    "fish",
    "chessboard",
    "orange",
    "cloud",
)
CLASSES: tuple[str, ...] = STUFF + THINGS

#: Colour words of each class with their probability, the usual one first.
COLOURS: dict[str, tuple[tuple[str, float], ...]] = {
    "grass": (("green", 1.0),),
    "water": (("blue", 1.0),),
    "sand": (("yellow", 1.0),),
    "brick": (("red", 0.7), ("gray", 0.3)),
    "sky": (("blue", 0.75), ("pink", 0.25)),
    "wood": (("brown", 1.0),),
    "ladybug": (("red", 0.75), ("yellow", 0.25)),
    "zebra": (("black and white", 1.0),),
    "sunflower": (("yellow", 1.0),),
    "leaf": (("green", 0.6), ("red", 0.2), ("yellow", 0.2)),
    "fish": (("silver", 0.5), ("blue", 0.25), ("purple", 0.25)),
    "chessboard": (("black and white", 0.7), ("brown", 0.3)),
    "orange": (("orange", 1.0),),
    "cloud": (("white", 0.7), ("gray", 0.3)),
}

#: Pattern words of a class, whatever its colour.
PATTERNS: dict[str, tuple[str, ...]] = {
    "water": ("wavy",),
    "ladybug": ("spotted", "dotted"),
    "zebra": ("striped",),
    "fish": ("scaly",),
    "chessboard": ("checkered",),
    "cloud": ("fluffy",),
    "orange": ("round",),
}

#: Frames for captions. They contain the words of the usual prompt templates, so that CLIP learns them.
PLAIN_FRAMES: tuple[str, ...] = ("{}", "a photo of {}", "a photo of {}.", "a picture of {}", "an image of {}")
FRAMES: tuple[str, ...] = (
    "a bad photo of {}.",
    "a good photo of {}.",
    "a cropped photo of {}.",
    "a close-up photo of {}.",
    "a low resolution photo of {}.",
    "a jpeg corrupted photo of {}.",
    "a blurry photo of {}.",
    "a pixelated photo of {}.",
    "a black and white photo of {}.",
    "a rendering of {}.",
    "a rendition of {}.",
    "a drawing of {}.",
    "a painting of {}.",
    "a sketch of {}.",
    "a doodle of {}.",
    "a sculpture of {}.",
    "a tattoo of {}.",
    "graffiti of {}.",
    "art of {}.",
    "itap of {}.",
    "{} in a video game.",
    "there is {} in the scene.",
    "this is {} in the scene.",
    "a cartoon of {}.",
    "an origami of {}.",
)
_ARTICLES: tuple[str, ...] = ("a", "a", "a", "the", "the", "one", "my", "this")
#: Words that say nothing about the picture.
FILLERS: tuple[str, ...] = (
    "nice", "cool", "weird", "clean", "dirty", "plastic", "toy", "plushie", "embroidered", "hard to see",
    "many",
)  # fmt: skip


def caption(rng: np.random.Generator, visible: Sequence[str], colour_of: dict[str, str], light: float) -> str:
    """Draw a caption of a scene.

    Args:
        rng: source of randomness.
        visible: classes that it may name.
        colour_of: colour word by class.
        light: brightness, usually 1.
    """
    named = list(visible)
    if rng.random() < 0.65:
        keep = rng.random(len(named)) < 0.5
        keep[rng.integers(len(named))] = True
        named = [name for name, kept in zip(named, keep, strict=True) if kept]
    rng.shuffle(named)
    things = [_phrase(rng, name, colour_of[name]) for name in named if name in THINGS]
    stuff = [_phrase(rng, name, colour_of[name]) for name in named if name in STUFF]
    text = ", ".join([*things[:-2], " and ".join(things[-2:])]) if things else ""
    if stuff:
        text = f"{text} on {' and '.join(stuff)}" if text else " and ".join(stuff)
    roll = rng.random()
    if roll < 0.1 and abs(light - 1.0) > 0.08:
        return f"a {'bright' if light > 1.0 else 'dark'} photo of {text}."
    if roll < 0.6:
        return PLAIN_FRAMES[int(rng.integers(len(PLAIN_FRAMES)))].format(text)
    return FRAMES[int(rng.integers(len(FRAMES)))].format(text)


def _phrase(rng: np.random.Generator, name: str, colour: str) -> str:
    words = [colour, *PATTERNS.get(name, ())]
    word = words[int(rng.integers(len(words)))]
    roll = rng.random()
    if roll < 0.05:
        return f"something {word}"
    if name in THINGS and roll < 0.08:
        return f"a {word} thing"
    phrase = f"{word} {name}" if roll < 0.32 else name
    if roll > 0.95:
        phrase = f"{FILLERS[int(rng.integers(len(FILLERS)))]} {name}"
    article = _ARTICLES[int(rng.integers(len(_ARTICLES)))]
    if name in STUFF and rng.random() < 0.6:
        return phrase
    return f"an {phrase}" if article == "a" and phrase[0] in "aeiou" else f"{article} {phrase}"


def pick_colour(rng: np.random.Generator, name: str) -> str:
    """Draw the colour word of an individual."""
    shares = COLOURS[name]
    roll = rng.random()
    for word, share in shares:
        roll -= share
        if roll < 0:
            return word
    return shares[0][0]


def caption_words() -> list[str]:
    """All phrases that captions are made of, for pruning a tokenizer's vocabulary."""
    colours = [word for shares in COLOURS.values() for word, _ in shares]
    patterns = [word for words in PATTERNS.values() for word in words]
    names = [*CLASSES, *(f"{name}s" for name in THINGS)]
    glue = ["and", "on", "something", "thing", "bright", "dark", "an", "with", ",", "."]
    return [*PLAIN_FRAMES, *FRAMES, *_ARTICLES, *FILLERS, *colours, *patterns, *names, *glue]
