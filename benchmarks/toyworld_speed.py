"""Measure how fast the toy world is drawn: ``python -m benchmarks.toyworld_speed [--count N]``.

Prints scenes per second of one process at several sizes, in processor time (as on an idle core) and in wall
time (as on this machine now).
"""

from __future__ import annotations

import argparse
import time

from pipeline.toyworld import scenes as toyworld

SIZES = (64, 96, 128, 192)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=300, help="scenes per size")
    count = parser.parse_args().count
    print("   size  images/s (processor time)  images/s (wall time)")
    for size in SIZES:
        toyworld.generate(0, 5, size)
        used, began = time.process_time(), time.perf_counter()
        toyworld.generate(1, count, size)
        used, began = time.process_time() - used, time.perf_counter() - began
        print(f"{size:4} px  {count / used:25.0f}  {count / began:20.0f}")


if __name__ == "__main__":
    main()
