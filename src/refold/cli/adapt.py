"""``refold train``, ``evaluate`` and ``predict``: a model for your images."""

from __future__ import annotations

import csv
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, cast

import typer

from refold.cli.console import console, error, is_main
from refold.cli.finish import show_result, stopped
from refold.cli.options import (
    BACKBONE,
    Accumulate,
    Adapter,
    Address,
    Augment,
    BatchSize,
    CheckpointEvery,
    ClassNames,
    Clips,
    Crops,
    Data,
    Decoder,
    Engine,
    Epochs,
    Features,
    Flip,
    Fold,
    Force,
    Frames,
    FrameStride,
    Head,
    HeadRate,
    ImageSize,
    LearningRate,
    Model,
    Optimizer,
    Precision,
    Pretrained,
    Resume,
    Sampling,
    Scales,
    Seed,
    Select,
    ShortSide,
    Split,
    Stride,
    Target,
    Task,
    Templates,
    TestList,
    TrainList,
    ValList,
    Views,
    Weights,
    Window,
    parse_inference,
    parse_method,
    require_engine,
)

__all__ = ["evaluate", "predict", "train"]

ForwardBatch = Annotated[
    int | None, typer.Option("--batch-size", help="Images of a forward pass, 64 if not given; not for dense tasks.")
]


def train(
    data: Data,
    model: Model = BACKBONE,
    method: Annotated[
        str, typer.Option(help="Method and hyper-parameters, for example 'RepAdapter(scale=5)'.")
    ] = "RepAdapter",
    task: Task = None,
    decoder: Decoder = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Run folder to write.")] = Path("runs/train"),
    weights: Weights = None,
    head: Head = "linear",
    freeze_head: Annotated[bool, typer.Option("--freeze-head", help="Leave a zero-shot head as it is.")] = False,
    template: Templates = None,
    class_names: ClassNames = None,
    start: Annotated[
        Path | None, typer.Option(help="Adapter file of the same method whose weights training starts from.")
    ] = None,
    train_list: TrainList = None,
    val_list: ValList = None,
    test_list: TestList = None,
    target: Target = None,
    split: Split = (0.8, 0.2, 0.0),
    epochs: Epochs = 100,
    batch_size: BatchSize = None,
    accumulate: Accumulate = 1,
    optimizer: Optimizer = "adamw",
    lr: LearningRate = 1e-3,
    head_lr: HeadRate = None,
    weight_decay: Annotated[float, typer.Option(help="Biases and norms are left out.")] = 1e-4,
    warmup_epochs: Annotated[float | None, typer.Option(help="A tenth of --epochs if not given.")] = None,
    drop_path: Annotated[
        float | None,
        typer.Option(help="Stochastic depth of the backbone; 0.1, of videos and with --features 0, if not given."),
    ] = None,
    label_smoothing: Annotated[float, typer.Option(help="Share of the target spread over all classes.")] = 0.0,
    mixup: Annotated[float, typer.Option(help="Alpha of mixup; 0 is off.")] = 0.0,
    cutmix: Annotated[float, typer.Option(help="Alpha of cutmix; 0 is off.")] = 0.0,
    augment: Augment = "none",
    features: Features = None,
    views: Views = 1,
    frames: Frames = None,
    sampling: Sampling = "uniform",
    stride: FrameStride = 4,
    clips: Clips = None,
    crops: Crops = None,
    fold: Fold = 1,
    class_weights: Annotated[str | None, typer.Option(help="'balanced' weighs classes by inverse frequency.")] = None,
    clip_grad: Annotated[float | None, typer.Option(help="Largest norm of the gradient.")] = None,
    consistency: Annotated[
        float, typer.Option(help="PACE: weight of the distance between two noisy passes; 0 is off. Two passes a step.")
    ] = 0.0,
    consistency_noise: Annotated[
        float, typer.Option(help="PACE: standard deviation of the noise on what the adapters add.")
    ] = 0.0,
    precision: Precision = "auto",
    image_size: ImageSize = None,
    in_chans: Annotated[int | None, typer.Option(help="Input channels.")] = None,
    normalize: Annotated[str, typer.Option(help="model, imagenet, inception or none.")] = "model",
    crop: Annotated[str, typer.Option(help="squash (the VTAB resize) or center.")] = "squash",
    select: Select = None,
    seed: Seed = 0,
    workers: Annotated[int, typer.Option(help="Processes that decode data sets too large for memory.")] = 0,
    pretrained: Pretrained = True,
    skip_bad_images: Annotated[
        bool, typer.Option("--skip-bad-images", help="Leave out files that cannot be decoded, and list them.")
    ] = False,
    checkpoint_every: CheckpointEvery = None,
    resume: Resume = False,
) -> None:
    """Train an adapter for your images; the best epoch on validation is kept, test is scored once.

    Example: refold train photos/ --model timm/vit_small_patch16_224 --method "RepAdapter(scale=5)" -o runs/a

    Example: refold train streets/ --task segment --decoder upernet --model timm/convnext_tiny --method E3VA
    --image-size 512 --batch-size 8 --augment standard -o runs/streets

    Example: refold train photos/ --model open_clip/ViT-B-32/laion2b_s34b_b79k --head zeroshot --crop center
    --template "a photo of a {}." -o runs/clip

    Example: refold train clips/ --task video --frames 8 --method "STAdapter(frames=8)" --augment crop --clips 2
    --crops 3 -o runs/moves
    """
    from refold.training import TrainConfig
    from refold.training import train as run

    config = TrainConfig(
        data=data,
        task=task,
        decoder=decoder,
        model=model,
        method=parse_method(method),
        output=str(output),
        weights=None if weights is None else str(weights),
        head=head,
        freeze_head=freeze_head,
        templates=tuple(template) if template else None,
        class_names=None if class_names is None else str(class_names),
        start=None if start is None else str(start),
        train=train_list,
        val=val_list,
        test=test_list,
        target=target,
        fractions=split,
        epochs=epochs,
        batch_size=cast(int, batch_size),
        accumulate=accumulate,
        optimizer=optimizer,
        lr=lr,
        head_lr=head_lr,
        weight_decay=weight_decay,
        warmup_epochs=warmup_epochs,
        drop_path=cast(float, drop_path),
        label_smoothing=label_smoothing,
        mixup=mixup,
        cutmix=cutmix,
        augment=augment,
        features=features,
        views=views,
        frames=frames,
        sampling=sampling,
        stride=stride,
        clips=1 if clips is None else clips,
        crops=1 if crops is None else crops,
        fold=fold,
        class_weights=class_weights,
        clip_grad=clip_grad,
        consistency=consistency,
        consistency_noise=consistency_noise,
        precision=precision,
        image_size=image_size,
        in_chans=in_chans,
        normalize=normalize,
        crop=crop,
        select=select,
        seed=seed,
        workers=workers,
        pretrained=pretrained,
        skip_bad_images=skip_bad_images,
        checkpoint_every=checkpoint_every,
    )
    try:
        result = run(config, resume=resume, progress=None)
    except KeyboardInterrupt as stop:
        raise stopped(stop) from None
    if not is_main():
        return
    show_result(result, config.method, output)


def evaluate(
    adapter: Adapter,
    data: Annotated[str | None, typer.Argument(help="Labelled images; the run's own data if not given.")] = None,
    split: Annotated[str, typer.Option(help="train, val or test.")] = "test",
    target: Target = None,
    batch_size: ForwardBatch = None,
    window: Window = None,
    stride: Stride = None,
    scales: Scales = None,
    flip: Flip = False,
    short_side: ShortSide = None,
    clips: Clips = None,
    crops: Crops = None,
    weights: Weights = None,
    force: Force = False,
    skip_bad_images: Annotated[
        bool, typer.Option("--skip-bad-images", help="Leave out files that cannot be decoded.")
    ] = False,
) -> None:
    """Score an adapted model on labelled images, in float32.

    Example: refold evaluate runs/a photos/ --split test

    Example: refold evaluate runs/streets --split val --window 512 --scale 0.75 --scale 1 --scale 1.25 --flip

    Example: refold evaluate runs/moves clips/ --clips 4 --crops 3
    """
    from refold.report.grids import metrics_grid, per_class_grid
    from refold.report.tables import rich_table
    from refold.training import evaluate as run

    result = run(
        adapter,
        data,
        split=split,
        target=target,
        batch_size=batch_size,
        weights=weights,
        force=force,
        skip_bad_images=skip_bad_images,
        inference=parse_inference(window, stride, scales, flip),
        short_side=short_side,
        clips=clips,
        crops=crops,
    )
    console.print(rich_table(metrics_grid({split: result.metrics})))
    if "per_class" in result.details:
        console.print(rich_table(per_class_grid(result.details["per_class"])))


def predict(
    adapter: Adapter,
    images: Annotated[
        str | None, typer.Argument(help="An image or a video, or a folder of these.", show_default=False)
    ] = None,
    inputs: Annotated[str | None, typer.Option("--input", help="The images, if they are not the argument.")] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="CSV to write, the terminal if not given; of segmentation and detection a folder, which is needed, "
            "and with --engine ray a folder of Parquet files.",
        ),
    ] = None,
    batch_size: ForwardBatch = None,
    threshold: Annotated[
        float | None, typer.Option(help="Detection: lowest score of what is drawn; 0.5 if not given.")
    ] = None,
    window: Window = None,
    stride: Stride = None,
    scales: Scales = None,
    flip: Flip = False,
    short_side: ShortSide = None,
    clips: Clips = None,
    crops: Crops = None,
    weights: Weights = None,
    force: Force = False,
    skip_bad_images: Annotated[
        bool, typer.Option("--skip-bad-images", help="Leave out files that cannot be decoded.")
    ] = False,
    engine: Engine = "sequential",
    address: Address = None,
    workers: Annotated[
        int | None,
        typer.Option(help="Ray: processes with the model; one a GPU, or one for two cores, if not given."),
    ] = None,
) -> None:
    """Predict with an adapted model: one row an image or a video, with a score for each class.

    Of segmentation OUTPUT/masks holds a palette PNG of class indices for each image, of detection
    OUTPUT/predictions.json COCO's rows of results (image_id by file_name); OUTPUT/overlays shows them.

    Example: refold predict runs/a new-photos/ --output predictions.csv

    With --engine ray whole images are predicted in many processes, and the same command goes on after a stop:
    OUTPUT/part-*.parquet have the CSV's columns, OUTPUT/_skipped.csv names what --skip-bad-images left out.

    Example: refold predict runs/streets new-streets/ --output seen

    Example: refold predict runs/a archive/ --engine ray --skip-bad-images --output predictions
    """
    import sys

    from refold.errors import DataError
    from refold.training import predict as run
    from refold.training import resolve

    if output is not None and not output.parent.is_dir():
        raise DataError("the folder does not exist", where=str(output.parent), remedy="Create it first")
    if (images is None) == (inputs is None):
        reason = "are named twice" if images is not None else "are not named"
        raise DataError(reason, where="the images", remedy="Name them once: refold predict ADAPTER IMAGES")
    images = cast(str, images or inputs)
    require_engine(engine, {"--address": address, "--workers": workers})
    inference = parse_inference(window, stride, scales, flip)
    if engine == "ray":
        from refold.sweeps import predict_batches

        if output is None:
            raise DataError("is needed for --engine ray", where="--output", remedy="Name a folder to write")
        others = (threshold, inference, short_side, clips, crops)
        if any(value is not None for value in others):
            raise DataError("predicts whole images, without options of dense tasks or videos", where="--engine ray")
        found = predict_batches(
            adapter, images, output, weights=weights, force=force, skip_bad_images=skip_bad_images,
            batch_size=batch_size, workers=workers, address=address, progress=None,
        )  # fmt: skip
        _tell_skipped(found.skipped)
        console.print(f"{found.rows} predictions, {found.before} of them from before: {output}", highlight=False)
        return
    ready = resolve(adapter, weights=weights, force=force)
    if ready.dense and output is None:
        raise DataError("is needed for task " + repr(ready.kind), where="--output", remedy="Name a folder to write")
    rows = run(
        ready.model,
        images,
        batch_size=batch_size,
        skip_bad_images=skip_bad_images,
        output=output if ready.dense else None,
        threshold=threshold,
        inference=inference,
        short_side=short_side,
        clips=clips,
        crops=crops,
    )
    if ready.dense:
        _tell_skipped(rows.skipped)
        console.print(f"{len(rows)} images: {output}", highlight=False)
        return
    with output.open("w", newline="") if output is not None else nullcontext(sys.stdout) as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    _tell_skipped(rows.skipped)
    if output is not None:
        console.print(f"{len(rows)} predictions: {output}")


def _tell_skipped(skipped: list[tuple[str, str]]) -> None:
    for path, reason in skipped:
        error(f"skipped {path}: {reason}")
