"""CPU time of labelling under glibc's memory settings: in the first thread, and in two, as in a worker.

    python -m benchmarks.malloc [--images DIR] [--count 8] [--model ViT-B-16-quickgelu]

Seconds of CPU, unlike seconds, change little when other work is running. Weights are random.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

from benchmarks.label_job import CLASSES, PHOTOS, PRETRAINED, ROOT, processor, spread, versions
from pipeline.cluster.session import WORKER_MALLOC

TUNABLES = WORKER_MALLOC["GLIBC_TUNABLES"]
SETTINGS = {
    "glibc's own": "",
    "an arena for each thread": ":".join(part for part in TUNABLES.split(":") if "arena" not in part),
    "of the job's workers": TUNABLES,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=Path, default=PHOTOS)
    parser.add_argument("--count", type=int, default=8, help="photographs")
    parser.add_argument("--model", default="ViT-B-16-quickgelu")
    parser.add_argument("--threads", type=int, help=argparse.SUPPRESS)  # runs this module again
    arguments = parser.parse_args()
    photos = sorted(path for path in arguments.images.iterdir() if path.suffix.lower() == ".jpg")
    if not photos:
        raise SystemExit(f"no photographs in {arguments.images}: name a folder with --images")
    photos = spread(photos, arguments.count)
    if arguments.threads:
        measure(photos, arguments.model, arguments.threads)
        return
    print(f"{arguments.model}, {len(photos)} photographs; {processor()}, {versions()}")
    print("command: python -m benchmarks.malloc " + " ".join(sys.argv[1:]) + "\n")
    print("| memory settings | threads | user s/image | system s/image | page faults/image |")
    print("|---|---|---|---|---|")
    for name, tunables in SETTINGS.items():
        for threads in (1, 2):
            done = subprocess.run(
                [sys.executable, "-m", "benchmarks.malloc", *sys.argv[1:], "--threads", str(threads)],
                cwd=ROOT,
                env=os.environ | {"GLIBC_TUNABLES": tunables},
                stdout=subprocess.PIPE,
                text=True,
                check=True,
            )
            print(f"| {name} | {threads} | {done.stdout.strip()} |", flush=True)


def measure(photos: list[Path], model: str, threads: int) -> None:
    """Label all photographs twice, and print what the second time took."""
    from pipeline.files import images
    from pipeline.labelling.prepare import prepare_labeller
    from pipeline.labelling.recipes import load_recipe
    from pipeline.ontology.reading import parse_classes

    recipe = load_recipe("maskclip", [f"model={model}", f"pretrained={PRETRAINED}"])
    # One template suffices: the words are embedded beforehand.
    ontology = parse_classes(CLASSES, templates=("a photo of a {}.",))
    labeller = prepare_labeller(recipe, ontology).build(threads=1)
    decoded = [images.decode(photo.read_bytes()) for photo in photos]
    work = [(images.fit(image, recipe.images), (image.shape[0], image.shape[1])) for image in decoded]

    def label(first: int) -> Callable[[], None]:
        def run() -> None:
            for image, size in work[first::threads]:
                labeller.label([image], [size])

        return run

    for _ in range(2):
        before = resource.getrusage(resource.RUSAGE_SELF)
        if threads == 1:
            label(0)()  # in the first thread
        else:
            workers = [threading.Thread(target=label(first)) for first in range(threads)]
            for worker in workers:
                worker.start()
            for worker in workers:
                worker.join()
        after = resource.getrusage(resource.RUSAGE_SELF)
    user, system, faults = (
        (getattr(after, field) - getattr(before, field)) / len(photos)
        for field in ("ru_utime", "ru_stime", "ru_minflt")
    )
    print(f"{user:.2f} | {system:.3f} | {faults:,.0f}")


if __name__ == "__main__":
    main()
