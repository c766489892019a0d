"""The command ``maskmill``. Exit status: 0 done, 1 failed work, 2 wrong use, 130 interrupted."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from jobs.demo import Demo
from jobs.export import Export
from jobs.label import Label
from jobs.report import Report
from jobs.runs import Runs
from jobs.show import Show
from jobs.track import Track
from models.errors import MaskMillError, WrongUse
from pipeline.cluster.collector import collect_rarely
from pipeline.cluster.signals import end_process, interrupt_on_signals

if TYPE_CHECKING:
    from jobs.train.run import TrainOptions
    from pipeline.labelling.recipes import LabelRecipe
    from pipeline.ontology.ontology import Ontology

Flag = tyro.conf.FlagCreatePairsOff[bool]
Verbose = Annotated[Flag, tyro.conf.arg(aliases=["-v"])]
Repeated = Annotated[tuple[str, ...], tyro.conf.UseAppendAction]
Settings = Annotated[Repeated, tyro.conf.arg(name="set", metavar="KEY=VALUE")]
UNNESTED = tyro.conf.arg(name="")  # a group of options that are written, and listed, like all others


def recipes() -> int:
    """List the recipes with every field: those of label, and those of train."""
    import yaml

    from pipeline.labelling.recipes import LABEL_RECIPES
    from pipeline.training.clipseg.recipes import CLIPSEG_RECIPES
    from pipeline.training.maskclip_plus.recipes import MASKCLIP_PLUS_RECIPES

    books: dict[str, Any] = {
        "label": LABEL_RECIPES,
        "train maskclip-plus": MASKCLIP_PLUS_RECIPES,
        "train clipseg": CLIPSEG_RECIPES,
    }
    for command, book in books.items():
        fields = {recipe.name: recipe.to_dict() for recipe in book.recipes.values()}
        print(yaml.safe_dump({command: fields}, sort_keys=False))
    return 0


def evaluate(
    *,
    labels: str | None = None,
    recipe: str | None = None,
    model: str | None = None,
    settings: Settings = (),
    dataset: str | None = None,
    root: str | None = None,
    split: str | None = None,
    images: str | None = None,
    truth: str | None = None,
    ontology: str | None = None,
    protocol: Literal["seed", "unified", "custom"] | None = None,
    zero_shot: str | None = None,
    limit: int = 0,
    output: str | None = None,
    overwrite: Flag = False,
    workers: int | None = None,
    boundary: Flag = True,
    tracking: str | None = None,
    address: str | None = None,
    verbose: Verbose = False,
) -> int:
    """Measure labels against truth: a label table, or what a recipe makes of a benchmark's images.

    Args:
        labels: a label table, the --output of maskmill label.
        recipe: label the benchmark's images with this recipe first, instead of --labels.
        model: label them with this model (the --output of maskmill train) first, instead of --labels.
        settings: change one knob of the recipe; may be repeated.
        dataset: a benchmark by name; see maskmill datasets.
        root: its folder (a path, or s3://…).
        split: part of it; default: the one that papers report.
        images: your own images, with --truth, instead of --dataset.
        truth: folder of masks (PNG, values are class ids, 255 is ignored) for --images.
        ontology: meaning of the ids in --truth (default: the ontology of --labels), or with --recipe the
            words to label with, if not those of the benchmark.
        protocol: seed (MaskCLIP's repository) or unified (its successors); their figures do not compare.
        zero_shot: a split into seen and unseen classes: voc20, voc21, context60, cocostuff171, ….
        limit: only the first so many images, to try out.
        output: folder for the result, on a disk that all nodes share if --recipe runs on a cluster; default:
            a new one below results/.
        overwrite: replace a result that is already in --output.
        workers: Ray tasks that compare; 0 is this process alone; default: by the number of images.
        boundary: with --no-boundary boundary IoU is not measured.
        tracking: MLflow tracking URI; default: MLFLOW_TRACKING_URI, else SQLite in ./mlruns.db; off: none.
        address: of a Ray cluster for labelling.
        verbose: show what Ray says.
    """
    from jobs.evaluate import EvaluateJob, run
    from pipeline.ontology.ontology import load_ontology

    _exactly_one("--labels", labels, "--recipe or --model", recipe or model, command="evaluate")
    _exactly_one("--dataset", dataset, "--images", images, command="evaluate")
    for useless, without in (
        (settings and labels, "--set changes a recipe; it says nothing about --labels"),
        (truth and dataset, "--truth belongs to --images"),
        ((root or split) and images, "--root and --split belong to --dataset"),
        (limit < 0, f"--limit {limit} is no number of images"),
        (workers is not None and workers < 0, f"--workers {workers} is no number of tasks"),
    ):
        if useless:
            raise WrongUse("wrong_use", f"{without}.", "See maskmill evaluate --help.")
    classes = load_ontology(ontology) if ontology is not None else None
    opened = _truth(dataset, root, split, images, truth, classes, labels)
    if limit:
        opened = dataclasses.replace(opened, samples=opened.samples[:limit])
    chosen, own = _labelling_recipe(recipe, model, settings) if labels is None else (None, None)
    if classes is None and own is not None and set(opened.class_names) <= set(own.names):
        classes = own  # the words that the student was trained with
    return run(
        EvaluateJob(
            dataset=opened,
            labels=labels,
            recipe=chosen,
            ontology=classes if labels is None else None,
            protocol=protocol,
            zero_shot=zero_shot,
            output=output,
            overwrite=overwrite,
            workers=workers,
            boundary=boundary,
            tracking=tracking,
            address=address,
            verbose=verbose,
        )
    )


def benchmark(
    name: Annotated[str, tyro.conf.Positional],
    /,
    *,
    root: Annotated[Repeated, tyro.conf.arg(metavar="DATASET=DIR")] = (),
    labels: Annotated[Repeated, tyro.conf.arg(metavar="ROW=TABLE")] = (),
    weights: Annotated[Repeated, tyro.conf.arg(metavar="ROW=PATH")] = (),
    settings: Settings = (),
    row: Repeated = (),
    dataset: Repeated = (),
    images: str | None = None,
    concepts: str = "sports",
    recipe: str = "maskclip",
    limit: int = 0,
    image_size: Annotated[tuple[int, ...], tyro.conf.UseAppendAction] = (),
    seeds: int = 5,
    scenes: int = 60,
    output: str | None = None,
    overwrite: Flag = False,
    tracking: str | None = None,
) -> int:
    """Run the rows of a table and print them beside the published figures. "list" lists the tables.

    Args:
        name: toyworld, maskclip, maskclip-unified, …; list shows all.
        root: folder of a dataset, with #SPLIT if it is not the usual one: --root voc20=DIR#train; repeat it.
        labels: a label table for a row that is not labelled here: --labels "MaskCLIP+ (RN50)@voc20=TABLE".
        weights: weights of a row's model: --weights "CLIPSeg (PC+)=rd64-uni.pth".
        settings: a recipe field for all rows, such as pretrained=random:0 to try the path; may be repeated.
        row: only rows with this in their name, of toyworld sections (students, heads, …); may be repeated.
        dataset: only this dataset; may be repeated.
        limit: to try out: so many images of each dataset (one-shot: episodes; prompt-strategies: objects).
        image_size: clipseg-…: measure at this side of the network's input as well; may be repeated.
        images: concepts: folder, glob or list file of images.
        concepts: concepts: a list of the paper (batman, mario, sports, car-color, …) or "prompt, prompt, …".
        recipe: concepts: the recipe; --set changes it.
        seeds: toyworld: sets of scenes, for the confidence intervals.
        scenes: toyworld: scenes of each set.
        output: folder for the result; the same again goes on where it stopped. Default: below results/.
        overwrite: replace a result that is already in --output.
        tracking: MLflow tracking URI; default: MLFLOW_TRACKING_URI, else SQLite in ./mlruns.db; off: none.
    """
    from jobs.benchmark import BenchmarkJob, benchmarks, run
    from pipeline.labelling.recipes import parse_settings

    if name == "list":
        for key, description in benchmarks().items():
            print(f"{key:22} {description}")
        return 0
    return run(
        BenchmarkJob(
            name=name.replace("_", "-"),
            roots=_pairs("--root", root, last=False),
            labels=_pairs("--labels", labels),
            weights=_pairs("--weights", weights),
            settings=parse_settings(settings),
            rows=row,
            datasets=dataset,
            images=images,
            concepts=concepts,
            recipe=recipe,
            limit=limit,
            image_sizes=image_size,
            seeds=seeds,
            scenes=scenes,
            output=output,
            overwrite=overwrite,
            tracking=tracking,
        )
    )


def datasets() -> int:
    """List the benchmark datasets: what they are and how their folders must look."""
    from pipeline.datasets.registry import DATASETS

    for name, info in DATASETS.items():
        print(f"{name:14} {info.description} (split {info.default_split})\n  from {info.source.home}")
        print("\n".join(f"    {line}" for line in info.source.layout.splitlines()) + "\n")
    return 0


def segment(
    images: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="IMAGE...")],
    /,
    *,
    output: str,
    prompt: Repeated = (),
    prompt_image: Repeated = (),
    prompt_mask: Repeated = (),
    text_weight: float | None = None,
    threshold: Annotated[tuple[float, ...], tyro.conf.UseAppendAction] = (),
    prefix: Literal["plain", "fixed", "shuffle", "shuffle+"] = "plain",
    visual_prompt: str = "crop_blur_highlight352",
    blur: float | None = None,
    background: float | None = None,
    context: float | None = None,
    crop: Flag = True,
    crop_size: int | None = None,
    example_size: int | None = None,
    weights: str = "CIDAS/clipseg-rd64-refined",
    model: str | None = None,
    extract_layers: tuple[int, ...] | None = None,
    size: int | None = None,
    keep_ratio: Flag = False,
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto",
    max_pixels: int = 100_000_000,
    overwrite: Flag = False,
) -> int:
    """Find what words or example pictures describe (CLIPSeg): masks, heat maps and overlays.

    maskmill segment photos/ --prompt "a red car" --prompt-image cup.jpg --prompt-mask cup.png --output found

    Args:
        images: files, folders, globs ("photos/*.jpg") and list files of images.
        output: folder for pictures and results.json.
        prompt: words for what is looked for; may be repeated.
        prompt_image: an example picture of it; may be repeated.
        prompt_mask: what to look at in the example: a picture of its size, black but for the object. If
            given, one for each --prompt-image, in the same order; - for one without.
        text_weight: join the first --prompt with the first --prompt-image, and so on: the share of the words,
            0 to 1 (the released models were trained with up to 0.5). Default: words and pictures apart.
        threshold: least probability of a mask's pixels; one for all prompts, or repeated for each, words
            first. Default: 0.3, the paper's; 0.1 finds more.
        prefix: put around words: nothing (plain), "a photo of a {}." (fixed), the mean over the templates of
            the paper's training (shuffle, shuffle+).
        visual_prompt: how the object of an example with a mask is brought forward: crop_blur_highlight352
            (the paper's), blur_highlight, blur3_highlight, blur3_highlight01, crop, crop_blur_highlight,
            highlight, highlight2, overlay, image_only.
        blur: sigma in pixels of the blur on the background; 0 is none.
        background: brightness of the background: 1 as it is, 0 grey.
        context: cut out the object with this share of its extent on each side.
        crop: with --no-crop nothing is cut.
        crop_size: side that the cut is resized to; default: --example-size.
        example_size: side of the square that examples are squeezed to first; default: as in training, 352.
        weights: a decoder file (rd64-uni.pth), the --output of maskmill train clipseg, a folder in Hugging
            Face's layout, or a hub name.
        model: NAME:PRETRAINED of the CLIP beneath a decoder file; default: what the file says, or
            ViT-B-16-quickgelu:openai.
        extract_layers: blocks of CLIP that the decoder reads; default: as the weights say, else 3 6 9.
        size: side of the square that images are squeezed to; default: as in training, 352.
        keep_ratio: keep their shape: the short side becomes --size.
        precision: number format; auto is the fastest that the processor computes natively.
        max_pixels: larger images are recorded as failed.
        overwrite: replace what an earlier run left in --output.
    """
    from jobs.segment import SegmentJob, run

    if context is not None and not crop:
        raise WrongUse("wrong_use", "--context says how to crop.", "Leave out either it or --no-crop.")
    knobs = {"blur": blur, "background": background, "context": context, "size": crop_size}
    changes = [f"{knob}={value}" for knob, value in knobs.items() if value is not None]
    return run(
        SegmentJob(
            images=images,
            output=output,
            prompts=prompt,
            prompt_images=prompt_image,
            prompt_masks=prompt_mask,
            text_weight=text_weight,
            thresholds=threshold,
            prefix=prefix,
            visual_prompt=",".join([visual_prompt, *changes, *([] if crop else ["context=none"])]),
            example_size=example_size,
            weights=weights,
            clip=model,
            extract_layers=extract_layers,
            size=size,
            keep_ratio=keep_ratio,
            precision=precision,
            max_pixels=max_pixels,
            overwrite=overwrite,
        )
    )


def serve(
    *,
    model: Annotated[Repeated, tyro.conf.arg(metavar="[NAME=]SPEC")] = (),
    clip: str | None = None,
    host: str = "127.0.0.1",
    port: int | None = None,
    allow_host: Repeated = (),
    per_minute: int = 120,
    upload_mb: int = 32,
    verbose: Flag = False,
) -> int:
    """Serve a page on this machine that shows what models find in an image.

    Args:
        model: a recipe, a student's folder, or CLIPSeg weights (.pth, .safetensors, folder,
            clipseg:HUB-NAME); NAME= is what the page calls it; repeat it. Default: toy, which works offline.
        clip: MODEL:PRETRAINED beneath CLIPSeg decoder files; default: what the file says, or the paper's.
        host: address to listen on; 0.0.0.0 opens it to the network, where nobody is asked for a password.
        port: default: 7860, or any free one if that is taken; 0: any free one.
        allow_host: a further name under which browsers may reach it; may be repeated.
        per_minute: images that one client may send; 0: no limit.
        upload_mb: largest request in MiB.
        verbose: log every request.
    """
    from jobs.serve import ServeJob, run
    from pipeline.serving.limits import Limits

    if per_minute < 0 or upload_mb < 1:
        raise WrongUse(
            "wrong_use", "--per-minute and --upload-mb are positive.", "See maskmill serve --help."
        )
    return run(
        ServeJob(
            models=model,
            clip=clip,
            host=host,
            port=port,
            allow_hosts=allow_host,
            verbose=verbose,
            limits=Limits(per_minute=per_minute, upload_bytes=upload_mb * 2**20),
        )
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainFlags:
    """What every training is asked for besides its output; see ``jobs.train.run.TrainOptions``.

    Attributes:
        workers: training processes; default: one for each GPU, else this process alone.
        overwrite: delete the run that is in --output and train anew.
        register: put the model into MLflow's model registry under this name, as its challenger; a CLIPSeg,
            which is large with its CLIP, is copied into MLflow only if this is given.
        tracking: MLflow tracking URI; default: MLFLOW_TRACKING_URI, else SQLite in ./mlruns.db; off: none.
        system_metrics: track the load of this machine as well.
        address: of a Ray cluster; default: the one that RAY_ADDRESS names, else this machine alone.
        verbose: show what Ray says.
    """

    workers: int | None = None
    overwrite: Flag = False
    register: str | None = None
    tracking: str | None = None
    system_metrics: Flag = False
    address: str | None = None
    verbose: Verbose = False

    def options(self, output: str) -> TrainOptions:
        """The options of a run into ``output``."""
        from jobs.train.run import TrainOptions

        if self.workers is not None and self.workers < 0:
            raise WrongUse(
                "wrong_use", f"--workers {self.workers} is no number of processes.", "Give 0 or more."
            )
        return TrainOptions(
            output=output,
            overwrite=self.overwrite,
            workers=self.workers,
            address=self.address,
            tracking=self.tracking,
            system_metrics=self.system_metrics,
            register_as=self.register,
            verbose=self.verbose,
        )


def train_maskclip_plus(
    *,
    labels: str,
    output: str,
    recipe: str = "maskclip-plus-voc20",
    settings: Settings = (),
    ontology: str | None = None,
    unseen: str | None = None,
    dataset: str | None = None,
    root: str | None = None,
    split: str | None = None,
    images: str | None = None,
    truth: str | None = None,
    how: Annotated[TrainFlags, UNNESTED] = TrainFlags(),
) -> int:
    """Train a student on a label table: MaskCLIP+.

    The same command again goes on after a crash, from the last checkpoint.

    Args:
        labels: the teacher's label table, the --output of maskmill label.
        output: folder (or s3://… prefix, without a page) for the student, its checkpoints and its page; on a
            cluster one that all nodes reach.
        recipe: named recipe or YAML file (maskmill recipes lists them).
        settings: change one knob of the recipe: iterations=500, loop.batch_size=8; may be repeated.
        ontology: classes to train, YAML file or built-in name; default: those of --labels.
        unseen: classes whose truth is withheld: "cow, motorbike", or a zero-shot split (voc20); needs truth.
        dataset: truth for the seen classes: a benchmark by name (maskmill datasets), of the same images.
        root: its folder (a path, or s3://…).
        split: part of it.
        images: your own images, with --truth, instead of --dataset.
        truth: folder of masks (PNG, values are class ids, 255 is ignored) for --images.
        how: where it runs, and where it is tracked.
    """
    from jobs.train.maskclip_plus import MaskClipPlusJob, run
    from pipeline.ontology.ontology import load_ontology
    from pipeline.training.maskclip_plus.recipes import MASKCLIP_PLUS_RECIPES

    run_options = how.options(output)
    chosen = MASKCLIP_PLUS_RECIPES.load(recipe, settings)
    if unseen is not None:
        chosen = MASKCLIP_PLUS_RECIPES.change(chosen, {"form": "zero-shot", "unseen": _names(unseen)})
    classes = load_ontology(ontology) if ontology is not None else None
    opened = None
    if dataset is not None or images is not None or truth is not None:
        _exactly_one("--dataset", dataset, "--images", images, command="train maskclip-plus")
        given = None if dataset is not None else labels
        opened = _truth(dataset, root, split, images, truth, classes if dataset is None else None, given)
    return run(
        MaskClipPlusJob(
            labels=labels,
            recipe=chosen,
            ontology=classes,
            truth=opened,
            options=run_options,
        )
    )


def train_clipseg(
    *,
    output: str,
    recipe: str = "clipseg-phrasecut-plus",
    settings: Settings = (),
    labels: str | None = None,
    ontology: str | None = None,
    dataset: str | None = None,
    root: str | None = None,
    split: str | None = None,
    scenes: int | None = None,
    images: str | None = None,
    truth: str | None = None,
    unseen: str | None = None,
    start: str | None = None,
    how: Annotated[TrainFlags, UNNESTED] = TrainFlags(),
) -> int:
    """Train CLIPSeg to find what words and example pictures describe.

    The same command again goes on after a crash, from the last checkpoint.

    Args:
        output: folder (or s3://… prefix, without a page) for the model, its checkpoints and its page; on a
            cluster one that all nodes reach.
        recipe: named recipe or YAML file (maskmill recipes lists them).
        settings: change one knob of the recipe: iterations=500, reduce_dim=16; may be repeated.
        labels: a label table, the --output of maskmill label: training without annotation. With truth as
            well, where the --unseen classes are learnt from.
        ontology: what the classes are called, YAML file or built-in name: of --truth, or of --labels if not
            the table's own.
        dataset: phrasecut, or any benchmark by name (maskmill datasets).
        root: its folder (a path, or s3://…).
        split: the part of it to train on.
        scenes: of toyworld: how many (default 2000).
        images: your own images, with --truth, instead of --dataset.
        truth: folder of masks (PNG, values are class ids, 255 is ignored) for --images.
        unseen: classes left out of the truth (of the labels, where there is no truth): "cow, motorbike", a
            zero-shot split (pascal-unseen10), a fold (pascal5i:0, coco20i:3), or affordances.
        start: weights to go on from: a file (rd64-uni.pth), a folder, or a hub name; best with
            --recipe finetune.
        how: where it runs, and where it is tracked.
    """
    from jobs.train.clipseg import TrainClipSegJob, run
    from pipeline.datasets.registry import open_dataset
    from pipeline.ontology.ontology import load_ontology
    from pipeline.training.clipseg.recipes import CLIPSEG_RECIPES

    run_options = how.options(output)
    chosen = CLIPSEG_RECIPES.load(recipe, settings)
    if unseen is not None:
        chosen = CLIPSEG_RECIPES.change(chosen, {"source": {"unseen": _names(unseen)}})
    if start is not None:
        chosen = CLIPSEG_RECIPES.change(chosen, {"model": {"start": start}})
    truths = sum(given is not None for given in (dataset, images))
    if truths > 1 or (truths == 0 and labels is None):
        raise WrongUse(
            "wrong_use",
            "Give truth, or labels, or both.",
            "Use --labels TABLE, --dataset NAME --root DIR --split PART, or --images DIR --truth DIR "
            "--ontology FILE. Beside truth, labels are for the --unseen classes.",
        )
    classes = load_ontology(ontology) if ontology is not None else None
    opened: Any = None
    if dataset is not None:
        if split is None:
            raise WrongUse(
                "wrong_use",
                f"{dataset} has parts that are kept for tests.",
                "Name the one to train on: --split train (toyworld: --split seed-3).",
            )
        options: dict[str, Any] = {} if classes is None else {"ontology": classes}
        if dataset == "toyworld":
            options["count"] = 2000 if scenes is None else scenes
        opened = open_dataset(dataset, root=root, split=split, **options)
    elif images is not None:
        if truth is None or classes is None:
            raise WrongUse("wrong_use", "--images needs --truth and --ontology.", "Add them.")
        opened = open_dataset("pairs", images=images, masks=truth, ontology=classes)
    return run(
        TrainClipSegJob(
            recipe=chosen,
            labels=labels,
            ontology=classes if opened is None else None,
            dataset=opened,
            options=run_options,
        )
    )


def train(arguments: Annotated[tuple[str, ...], tyro.conf.Positional] = (), /) -> int:
    """Train a model on labels; see maskmill train --help for what can be trained.

    Args:
        arguments: what to train, and its options.
    """
    raise AssertionError("main gives these arguments to TRAINERS")


TRAINERS: dict[str, Callable[..., int]] = {
    "maskclip-plus": train_maskclip_plus,
    "clipseg": train_clipseg,
}


COMMANDS: dict[str, Callable[..., Any]] = {
    "label": Label,
    "show": Show,
    "train": train,
    "export": Export,
    "segment": segment,
    "serve": serve,
    "evaluate": evaluate,
    "benchmark": benchmark,
    "report": Report,
    "runs": Runs,
    "track": Track,
    "datasets": datasets,
    "recipes": recipes,
    "demo": Demo,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point; ends the process with the exit status, and takes Ctrl-C and SIGTERM for it."""
    interrupt_on_signals()
    collect_rarely()
    given = list(sys.argv[1:] if arguments is None else arguments)
    commands, prog = COMMANDS, "maskmill"
    description = "Images and class names in; a segmentation dataset and a trained model out."
    if given[:1] == ["train"]:
        commands, prog, given = TRAINERS, "maskmill train", given[1:]
        description = "Train a model on labels, on this machine or a Ray cluster."
    try:
        status: Any = tyro.extras.subcommand_cli_from_dict(
            commands,
            prog=prog,
            description=description,
            args=given,
            config=(tyro.conf.FlagCreatePairsOff, tyro.conf.DisallowNone),
        )
        status = status if isinstance(status, int) else status.run()
    except MaskMillError as error:
        print(f"maskmill: {error}", file=sys.stderr)
        status = error.exit_status
    except KeyboardInterrupt:
        print("Stopped. What is finished is kept: the same command goes on from there.", file=sys.stderr)
        status = 130
    end_process(status)


def _labelling_recipe(
    recipe: str | None, model: str | None, settings: Sequence[str]
) -> tuple[LabelRecipe, Ontology | None]:
    """How to label, and the classes that go with it, if it has some of its own."""
    from pipeline.labelling.recipes import LABEL_RECIPES

    if model is None or (recipe is None and model == "clipseg"):
        return LABEL_RECIPES.load(recipe or model or LABEL_RECIPES.default, settings), None
    if recipe is not None:
        raise WrongUse(
            "wrong_use", "--recipe says which CLIP labels, --model which trained model.", "Give one of them."
        )
    from pipeline.labelling.prepare import clipseg_recipe, student_recipe
    from pipeline.trained.clipseg import is_trained

    return (clipseg_recipe(model, settings), None) if is_trained(model) else student_recipe(model, settings)


def _truth(
    dataset: str | None,
    root: str | None,
    split: str | None,
    images: str | None,
    truth: str | None,
    classes: Ontology | None,
    labels: str | None,
) -> Any:
    """Images with masks: a benchmark by name, or a folder of each."""
    from pipeline.datasets.registry import open_dataset
    from pipeline.ontology.ontology import Ontology
    from pipeline.table.record import read_table_record

    if dataset in ("pairs", "coco-json"):
        options = {"ontology": classes} if classes is not None else {}
        return open_dataset(dataset, root=root, split=split, **options)
    if dataset == "phrasecut":
        raise WrongUse(
            "wrong_use",
            "PhraseCut asks for phrases, not for classes.",
            "Run maskmill benchmark clipseg-referring.",
        )
    if dataset is not None:
        if classes is not None and labels is not None:
            raise WrongUse("wrong_use", "--labels have an ontology already.", "Leave --ontology out.")
        return open_dataset(dataset, root=root, split=split)
    if truth is None or (classes is None and labels is None):
        raise WrongUse(
            "wrong_use",
            "--images needs --truth, and an --ontology unless --labels has one.",
            "See maskmill evaluate --help.",
        )
    if classes is None:
        assert labels is not None
        classes = Ontology.from_record(read_table_record(labels)["ontology"])
    return open_dataset("pairs", images=images, masks=truth, ontology=classes)


def _names(text: str) -> tuple[str, ...]:
    """Names between commas, each once."""
    return tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))


def _pairs(flag: str, given: Sequence[str], *, last: bool = True) -> dict[str, str]:
    """``NAME=VALUE`` arguments as a mapping, divided at the last = (names of rows hold some) or the first."""
    pairs = {}
    for text in given:
        name, separator, value = text.rpartition("=") if last else text.partition("=")
        if not separator or not name or not value:
            raise WrongUse(
                "wrong_use", f"{flag} {text!r} is not of the form NAME=VALUE.", f"Write {flag} voc20=DIR."
            )
        pairs[name] = value
    return pairs


def _exactly_one(
    first: str, one: str | None, second: str, other: str | None, *, command: str = "label"
) -> str:
    given = [value for value in (one, other) if value is not None]
    if len(given) != 1:
        raise WrongUse(
            "wrong_use",
            f"Give either {first} or {second}{', not both' if given else ''}.",
            f"See maskmill {command} --help.",
        )
    return given[0]


if __name__ == "__main__":
    main()
