"""Compare the time and size of PNG encoders for label and confidence maps, with the chosen codecs.

    python -m benchmarks.png_codecs [--repeat N] [--images N] [--only-chosen]

The maps imitate those of the label job: per-class scores on a coarse grid, scaled by temperature 100,
interpolated to image size, then argmax and its probability. Times are medians on one core.
"""

from __future__ import annotations

import argparse
import io
import statistics
import time
import zlib
from collections.abc import Callable
from functools import partial

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image

from pipeline.table import labels
from pipeline.table.statistics import quality, segments

Map = npt.NDArray[np.uint8]


def maps(seed: int, classes: int, grid: tuple[int, int], size: tuple[int, int]) -> tuple[Map, Map]:
    """Label map and confidence map, uint8 (H, W), of one synthetic image."""
    random = np.random.default_rng(seed)
    height, width = size
    scores = np.empty((classes, height, width), dtype=np.float32)
    for index in range(classes):
        # Cosines of patches and names: a level per class, a smooth part (objects), noise per patch.
        coarse = cv2.resize(random.normal(size=(5, 6)), grid[::-1], interpolation=cv2.INTER_CUBIC)
        cosine = 0.2 + 0.01 * random.normal() + 0.02 * coarse + 0.006 * random.normal(size=grid)
        scores[index] = cv2.resize(cosine.astype(np.float32), (width, height), interpolation=cv2.INTER_LINEAR)
    scores = np.exp(100 * (scores - scores.max(0)))
    return scores.argmax(0).astype(np.uint8), np.round(255 / scores.sum(0)).astype(np.uint8)


def cv2_png(level: int, strategy: int, row_filter: int | None = None) -> Callable[[Map], bytes]:
    """An OpenCV encoder."""
    flags = [cv2.IMWRITE_PNG_COMPRESSION, level, cv2.IMWRITE_PNG_STRATEGY, strategy]
    if row_filter is not None:
        flags += [cv2.IMWRITE_PNG_FILTER, row_filter]
    return lambda array: cv2.imencode(".png", array, flags)[1].tobytes()


def pillow_png(level: int, strategy: int) -> Callable[[Map], bytes]:
    """A Pillow encoder."""

    def encode(array: Map) -> bytes:
        buffer = io.BytesIO()
        Image.fromarray(array).save(buffer, "PNG", compress_level=level, compress_type=strategy)
        return buffer.getvalue()

    return encode


def variants() -> dict[str, Callable[[Map], bytes]]:
    """All encoders to compare."""
    strategies = {"default": 0, "filtered": 1, "huffman": 2, "rle": 3}
    found: dict[str, Callable[[Map], bytes]] = {}
    for name, number in strategies.items():
        for level in (1, 3, 6) if name in ("default", "filtered") else (1,):
            found[f"pillow level {level} {name}"] = pillow_png(level, number)
    filters = {"auto": None}
    for label in ("NONE", "SUB", "UP", "AVG", "PAETH"):
        value = getattr(cv2, f"IMWRITE_PNG_FILTER_{label}", None)
        if value is not None:
            filters[label.lower()] = value
    for label, value in filters.items():
        for name, number in strategies.items():
            for level in (1, 3, 6) if name in ("default", "filtered") else (1,):
                found[f"opencv level {level} {name} {label}"] = cv2_png(level, number, value)
    return found


def decode(data: bytes) -> object:
    """Decode a PNG with OpenCV."""
    return cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)


def measure(call: Callable[[], object], repeat: int) -> float:
    """Median milliseconds, after one warm-up call."""
    call()
    times = []
    for _ in range(repeat):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return 1000 * statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--images", type=int, default=6)
    parser.add_argument("--only-chosen", action="store_true")
    args = parser.parse_args()
    cv2.setNumThreads(1)
    data = [maps(seed, 20, (32, 43), (375, 500)) for seed in range(args.images)]
    regions = [
        sum(cv2.connectedComponents((m == c).astype(np.uint8))[0] - 1 for c in range(20)) for m, _ in data
    ]
    print(
        f"{len(data)} maps of 500x375, 20 classes, {statistics.mean(regions):.0f} regions on average;",
        end=" ",
    )
    print(f"opencv {cv2.__version__}, zlib {zlib.ZLIB_RUNTIME_VERSION}, medians on one core")
    if not args.only_chosen:
        for which, kind in enumerate(("mask", "confidence")):
            print(f"\n{kind:36} {'encode ms':>9} {'decode ms':>9} {'bytes':>8}")
            rows = []
            for name, encode in variants().items():
                blobs = [encode(pair[which]) for pair in data]
                ms = statistics.mean(measure(partial(encode, pair[which]), args.repeat) for pair in data)
                back = statistics.mean(measure(partial(decode, blob), args.repeat) for blob in blobs)
                rows.append((ms, back, statistics.mean(map(len, blobs)), name))
            for ms, back, size, name in sorted(rows):
                print(f"{name:36} {ms:9.2f} {back:9.2f} {size:8.0f}")
    print(f"\n{'chosen':36} {'ms':>9} {'bytes':>8}")
    chosen: dict[str, Callable[[Map, Map], object]] = {
        "encode_mask": lambda m, c: labels.encode_mask(m),
        "encode_confidence": lambda m, c: labels.encode_confidence(c),
        "segments": lambda m, c: segments(m, c, ignore_index=255),
        "quality": lambda m, c: quality(c, m, ignore_index=255),
    }
    for name, call in chosen.items():
        ms = statistics.mean(measure(partial(call, *pair), args.repeat) for pair in data)
        results = [call(*pair) for pair in data]
        sizes = [len(result) for result in results if isinstance(result, bytes)]
        shown = f"{statistics.mean(sizes):8.0f}" if sizes else ""
        print(f"{name:36} {ms:9.2f} {shown}")


if __name__ == "__main__":
    main()
