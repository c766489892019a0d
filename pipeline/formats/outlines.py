"""Segments as single polygons without holes, and back.

Corners are centres of pixels. A polygon covers the pixels inside it, by the even-odd rule, and those on its
edges: so ``cv2.fillPoly`` draws it, and whatever is built on it. Under this rule the outline of a connected
piece, along the centres of its outermost pixels, covers the piece exactly. A hole is joined to the outline by
a bridge, a line that runs to the hole and back within the piece; it covers nothing new.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt

Mask = npt.NDArray[np.uint8]
Corners = npt.NDArray[np.int32]
"""(N, 2), x and y."""


def outlines(mask: Mask) -> Iterator[Corners]:
    """The polygon of each 8-connected piece of a mask.

    Args:
        mask: (H, W), 0 and 1.

    Yields:
        (N, 2); one corner for a single pixel, two for a straight line.
    """
    import cv2

    contours, hierarchy = cv2.findContours(mask, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    if hierarchy is None:
        return
    children: dict[int, list[int]] = {}
    for number, (_, _, _, parent) in enumerate(hierarchy.reshape(-1, 4).tolist()):
        if parent >= 0:
            children.setdefault(parent, []).append(number)
    for number, (_, _, _, parent) in enumerate(hierarchy.reshape(-1, 4).tolist()):
        if parent < 0:
            holes = [contours[child].reshape(-1, 2) for child in children.get(number, ())]
            outline = contours[number].reshape(-1, 2)
            yield _straightened(_bridged(outline, holes, mask) if holes else outline)


def _bridged(outline: Corners, holes: Sequence[Corners], mask: Mask) -> Corners:
    """One closed walk along the outline and around all holes.

    Args:
        outline: (N, 2), every pixel of it.
        holes: (N, 2) each, the pixels of the piece around the hole.
        mask: where the piece is.
    """
    # From its leftmost pixel, each hole is joined to what is met first to the left: the outline, or a hole
    # that begins further left and so is joined already.
    walks = [outline]
    for hole in holes:
        first = int(np.lexsort((hole[:, 1], hole[:, 0]))[0])
        around = np.roll(hole, -first, axis=0)
        walks.append(np.concatenate([around, around[:1]]))
    walks[1:] = sorted(walks[1:], key=lambda walk: (int(walk[0, 0]), int(walk[0, 1])))
    met: dict[tuple[int, int], tuple[int, int]] = {}
    joined: list[dict[int, list[int]]] = [{} for _ in walks]
    for number, walk in enumerate(walks):
        if number:
            x, y = int(walk[0, 0]), int(walk[0, 1])
            gaps = np.flatnonzero(mask[y, :x] == 0)
            place = (int(gaps[-1]) + 1 if len(gaps) else 0, y)
            owner, step = met[place]
            joined[owner].setdefault(step, []).append(number)
        for step, (x, y) in enumerate(walk.tolist()):
            met.setdefault((x, y), (number, step))
    return np.concatenate(list(_walked(walks, joined)))


def _walked(walks: Sequence[Corners], joined: Sequence[Mapping[int, Sequence[int]]]) -> Iterator[Corners]:
    """The pieces of the whole walk, which leaves a walk where others are joined, and comes back."""

    def steps(number: int) -> Iterator[Corners | int]:
        walk, begin = walks[number], 0
        for step in sorted(joined[number]):
            yield walk[begin : step + 1]
            for other in joined[number][step]:
                yield other
                yield walk[step : step + 1]
            begin = step + 1
        yield walk[begin:]

    # By hand, as a chain of holes may be longer than Python's stack.
    under_way = [steps(0)]
    while under_way:
        piece = next(under_way[-1], None)
        if piece is None:
            under_way.pop()
        elif isinstance(piece, int):
            under_way.append(steps(piece))
        else:
            yield piece


def _straightened(walk: Corners) -> Corners:
    """A closed walk without the pixels between its corners."""
    if len(walk) > 1:
        walk = walk[(walk != np.roll(walk, 1, axis=0)).any(1)]
    if len(walk) < 3:
        return walk
    came, goes = walk - np.roll(walk, 1, axis=0), np.roll(walk, -1, axis=0) - walk
    straight = (came[:, 0] * goes[:, 1] == came[:, 1] * goes[:, 0]) & ((came * goes).sum(1) > 0)
    return walk[~straight]
