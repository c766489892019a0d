"""``maskmill review``: which labels people should look at first, and how well they agree with the truth."""

from __future__ import annotations

import functools
from collections import Counter
from dataclasses import dataclass
from typing import Annotated

import numpy as np
from rich.console import Console
from tyro.conf import Positional, arg

from jobs.console import counted, stderr_console, timed
from jobs.options import Flag, Maybe
from models.errors import WrongUse
from pipeline.files.outputs import check_output_folder
from pipeline.files.storage import canonical_uri, open_storage
from pipeline.review.queue import ACCEPTABLE, Queue, find_queue, queue_place, read_queue, write_queue
from pipeline.table.corrections import CORRECTIONS_DIR, OFF, open_corrections
from pipeline.table.record import find_table_record, read_table_record


@dataclass(frozen=True, kw_only=True)
class Review:
    """Choose the labels that people should look at first: doubtful ones from many scenes, and some at random.

    maskmill review pets/ --worst 200 --random 50

    maskmill serve --review pets/

    Images that people have reviewed already are left out. What they say is kept beside the table, in
    corrections/, and takes the place of its labels in train, evaluate and export.

    Attributes:
        table: the --output of maskmill label.
        worst: number of images with doubtful labels.
        random: number of images at random; what people say of these holds for the table as a whole.
        against: a second label table of the same images, such as a student's: images on which the two
            disagree are chosen, too.
        honeypots: truth for some of the images, of which a few are mixed in: a label table of true
            labels, or a folder of masks (PNG, values are class ids of the table, named like the images).
        honeypot_share: share of the queue with known truth (0 to 1); less if there are too few.
        acceptable: smallest mean IoU with the truth at which a honeypot's labels may be accepted.
        agreement: make no queue; show how well reviewers agree with the honeypots of the existing one.
        output: file for the queue, ending in .json; default: review.json in the table's folder.
        corrections: folder (or s3://… prefix) for what people say; default: corrections/ in the table's.
        diverse: choose by doubt alone, without looking at the images: the same scene may appear many times.
        again: also take images that have been reviewed.
        seed: of the random choice.
        overwrite: replace an existing queue; corrections stay.
    """

    table: Annotated[Positional[str], arg(metavar="TABLE")]
    worst: int = 200
    random: int = 50
    against: Annotated[Maybe[str], arg(metavar="TABLE")] = None
    honeypots: Annotated[Maybe[str], arg(metavar="TABLE|FOLDER")] = None
    honeypot_share: float = 0.1
    acceptable: float = ACCEPTABLE
    agreement: Flag = False
    output: Maybe[str] = None
    corrections: Maybe[str] = None
    diverse: Flag = True
    again: Flag = False
    seed: int = 0
    overwrite: Flag = False

    def run(self, console: Console | None = None) -> int:
        """Write the queue, or print the agreement.

        Raises:
            MaskMillError: ``wrong_use``, ``input_missing``, ``output_differs`` for a queue that is there;
                ``image_invalid`` if no truth is that of an image.
        """
        console = console or stderr_console()
        self._check()
        if self.agreement:
            return self._tell_agreement(console)
        place = self.output or self.table
        read_table_record(self.table)
        if self.against is not None:
            read_table_record(self.against)
        storage, name = queue_place(place)
        check_output_folder(storage.uri)
        there = find_queue(place) if not self.overwrite else None
        if there is not None:
            raise WrongUse(
                "output_differs",
                f"{storage.uri_of(name)} is a queue of {len(there.entries):,} images already.",
                "Review it (maskmill serve --review), replace it with --overwrite, or name another --output.",
            )
        return self._make(place, console)

    def _check(self) -> None:
        for wrong, message in (
            (min(self.worst, self.random) < 0, "--worst and --random are numbers of images."),
            (self.worst + self.random < 1, "No image is asked for."),
            (not 0 < self.honeypot_share < 1, f"--honeypot-share {self.honeypot_share} is not a share."),
            (not 0 <= self.acceptable <= 1, f"--acceptable {self.acceptable} is no mean IoU."),
            (
                self.output is not None and not self.output.endswith(".json"),
                f"--output {self.output} does not end in .json.",
            ),
        ):
            if wrong:
                raise WrongUse("wrong_use", message, "See maskmill review --help.")

    def _make(self, place: str, console: Console) -> int:
        from pipeline.evaluation.truth import find_truth
        from pipeline.review.choosing import Wish, choose

        say = functools.partial(console.print, highlight=False, soft_wrap=True, markup=False)
        table = open_storage(self.table)
        corrections = (
            table.uri_of(CORRECTIONS_DIR) if self.corrections is None else canonical_uri(self.corrections)
        )
        check_output_folder(corrections)
        seen = open_corrections(self.table, corrections if self._is_there(corrections) else OFF)
        leave_out = np.empty(0, np.int64) if seen is None or self.again else seen.ids
        known, count = np.empty(0, np.int64), 0
        if self.honeypots is not None:
            known = find_truth(self.honeypots, table, read_table_record(self.table).ontology).ids
            share = self.honeypot_share
            count = max(1, round((self.worst + self.random) * share / (1 - share)))
        wish = Wish(
            worst=self.worst,
            chance=self.random,
            known=known,
            honeypots=count,
            leave_out=leave_out,
            against=self.against,
            diverse=self.diverse,
            seed=self.seed,
        )
        with counted(console, "looking at doubtful images", "images") as progress:
            chosen = choose(self.table, wish, progress=progress)
        queue = Queue(
            table=table.uri,
            corrections=corrections,
            against=None if self.against is None else canonical_uri(self.against),
            truth=None if self.honeypots is None else canonical_uri(self.honeypots),
            acceptable=self.acceptable,
            embedding=chosen.embedding,
            seed=self.seed,
            entries=tuple(chosen.entries),
        )
        for note in chosen.notes:
            say(note)
        if not chosen.entries:
            say("There is nothing to review: no labelled image is left.")
            return 0
        with timed(console, "writing the queue"):
            written = write_queue(queue, place)
        kinds = Counter(reason.kind for entry in chosen.entries for reason in entry.reasons)
        lines = [f"Queue          {written}: {len(chosen.entries):,} images"]
        lines += [f"  {kind:<12} {count:,}" for kind, count in kinds.most_common()]
        if len(leave_out):
            lines.append(f"  left out     {len(leave_out):,} that are reviewed already")
        if count:
            mixed_in = sum(entry.known for entry in chosen.entries)
            lines.append(f"  honeypots    {mixed_in:,}, whose truth is known")
        lines += [
            f"Review it:     maskmill serve --review {place}",
            f"Or elsewhere:  maskmill export {self.table} --queue {place} --format labelstudio "
            "--output tasks/",
        ]
        say("\n".join(lines))
        return 0

    def _is_there(self, corrections: str) -> bool:
        return find_table_record(open_storage(corrections)) is not None

    def _tell_agreement(self, console: Console) -> int:
        from pipeline.review.desk import open_desk

        place = self.output or self.table
        queue = read_queue(place)
        if queue.truth is None:
            raise WrongUse(
                "wrong_use",
                "This queue has no images whose truth is known.",
                "Make one with maskmill review TABLE --honeypots TRUTH.",
            )
        desk = open_desk(queue)
        known = sum(entry.known for entry in desk.entries)
        console.print(f"Of {known:,} images whose truth is known:", highlight=False)
        lines = [f"  {one.described()}" for one in desk.agreement()] or ["  nobody has reviewed any yet"]
        console.print("\n".join(lines), highlight=False, soft_wrap=True, markup=False)
        return 0
