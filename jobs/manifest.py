"""``maskmill manifest``: images → a Parquet file that lists them, with their ids."""

from __future__ import annotations

import csv
import functools
import io
import itertools
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Annotated

from rich.console import Console
from tyro.conf import Positional, arg

from jobs.console import counted, stderr_console
from jobs.options import Flag, Maybe, refuse_less_than_one
from models.errors import WrongUse
from pipeline.corpus.manifest import build_corpus, read_corpus, write_manifest
from pipeline.corpus.selection import Distinct, distinct, some_of
from pipeline.files.storage import Storage, canonical_uri, open_storage


@dataclass(frozen=True, kw_only=True)
class MakeManifest:
    """List images once, with their ids, for maskmill label --manifest.

    If --output exists, new images are added to it; those that it lists stay.

    Attributes:
        images: folder, glob, list file (.txt, .csv, .jsonl, .parquet), COCO's .json, .tar archives, or
            Parquet files with images.
        output: Parquet file.
        limit: only the first N images.
        sample: only N images at random; a larger sample holds a smaller one.
        seed: of the random choice.
        dedupe: read all images, and list identical ones once; OUTPUT.duplicates.csv names the others.
    """

    images: Annotated[Positional[str], arg(metavar="IMAGES")]
    output: str
    limit: Maybe[int] = None
    sample: Maybe[int] = None
    seed: int = 0
    dedupe: Flag = False

    def run(self, console: Console | None = None) -> int:
        """Write the manifest, and print how many images are in it.

        Raises:
            MaskMillError: ``wrong_use``, ``input_missing``, ``dataset_invalid``, ``storage_unreachable``.
        """
        console = console or stderr_console()
        say = functools.partial(console.print, highlight=False, soft_wrap=True, markup=False)
        refuse_less_than_one(limit=self.limit, sample=self.sample)
        place = canonical_uri(self.output)
        folder, name = open_storage(place.rpartition("/")[0] or "/"), PurePosixPath(place).name
        if not name.endswith(".parquet"):
            raise WrongUse("wrong_use", f"--output {self.output} is no Parquet file.", "Write NAME.parquet.")
        before = read_corpus(place) if folder.exists(name) else None
        corpus = build_corpus(self.images, notice=say, limit=self.limit)
        corpus = some_of(corpus, self.sample, self.seed)
        if before is not None:
            corpus = before.extended(corpus)
        if self.dedupe:
            with counted(console, "reading images", "images") as report:
                once = distinct(corpus, lambda done: report(done, corpus.num_rows))
            corpus = once.corpus
            _report_copies(folder, name, once)
            if once.count:
                say(f"{once.count:,} equal to others, named in {place}.duplicates.csv")
            if once.unreadable:
                say(f"{once.unreadable:,} could not be read; they stay, and label records why")
        if corpus.signed:
            say("Signatures of addresses are not stored: label these images from their list, with --images.")
        write_manifest(corpus, place)
        known = before.num_rows if before is not None else 0
        more = f", {corpus.num_rows - known:,} more than before" if before is not None else ""
        say(f"{corpus.num_rows:,} images in {place}{more}")
        say(f"Label them:  maskmill label --manifest {self.output} --classes … --output …")
        return 0


def _report_copies(folder: Storage, name: str, once: Distinct) -> None:
    if not once.count:
        return
    with folder.new_file(f"{name}.duplicates.csv") as file:
        text = io.TextIOWrapper(file, "utf-8", newline="")
        csv.writer(text).writerows(itertools.chain([("uri", "equal_to")], once.copies()))
        text.detach()
