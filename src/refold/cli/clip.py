"""``refold zeroshot`` and ``interpolate``: image-text models before training, and between before and after."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from refold.cli.console import console
from refold.cli.options import (
    Adapter,
    ClassNames,
    Force,
    ImageSize,
    Model,
    Pretrained,
    Target,
    Templates,
    TestList,
    TrainList,
    ValList,
    Weights,
    parse_pairs,
)

if TYPE_CHECKING:
    from refold.report.grids import Grid
    from refold.training.zeroshot import Interpolated

__all__ = ["interpolate", "zeroshot"]

ForwardBatch = Annotated[int, typer.Option("--batch-size", help="Images of a forward pass.")]
Workers = Annotated[int, typer.Option(help="Processes that decode images.")]


def zeroshot(
    data: Annotated[
        str, typer.Argument(help="Labelled images; the classes' names are what the model reads.", metavar="DATA")
    ],
    model: Model,
    template: Templates = None,
    class_names: ClassNames = None,
    split: Annotated[str, typer.Option(help="train, val or test; all images where DATA is not split.")] = "test",
    train_list: TrainList = None,
    val_list: ValList = None,
    test_list: TestList = None,
    target: Target = None,
    crop: Annotated[
        str,
        typer.Option(
            help="center, CLIP's own, or squash, SigLIP's own and that of `refold train` unless told otherwise."
        ),
    ] = "center",
    image_size: ImageSize = None,
    batch_size: ForwardBatch = 64,
    weights: Weights = None,
    pretrained: Pretrained = True,
    skip_bad_images: Annotated[
        bool, typer.Option("--skip-bad-images", help="Leave out files that cannot be decoded.")
    ] = False,
    workers: Workers = 0,
) -> None:
    """Score an image-text model by its text embeddings of your class names, without training.

    To train from there: refold train --head zeroshot; what it reaches is what that has to beat.

    Example: refold zeroshot photos/ --model open_clip/ViT-B-32/laion2b_s34b_b79k --template "a photo of a {}."
    --template "a sketch of a {}."
    """
    from refold.data.tables import read_pairs
    from refold.report.grids import metrics_grid, per_class_grid
    from refold.report.tables import rich_table
    from refold.training.zeroshot import zeroshot as run

    result = run(
        model,
        data,
        templates=template or None,
        class_names=None if class_names is None else read_pairs(class_names, "CLASS,NAME"),
        split=split,
        train=train_list,
        val=val_list,
        test=test_list,
        target=target,
        skip_bad_images=skip_bad_images,
        weights=weights,
        pretrained=pretrained,
        image_size=image_size,
        crop=crop,
        batch_size=batch_size,
        workers=workers,
    )
    console.print(rich_table(metrics_grid({split: result.metrics})))
    console.print(rich_table(per_class_grid(result.details["per_class"])))


def interpolate(
    adapter: Adapter,
    alpha: Annotated[
        float | None,
        typer.Option(help="From 0, the zero-shot model, to 1, the adapted one; chosen on validation if not given."),
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="Labelled images with val and test splits; the run's own if not given.")
    ] = None,
    other: Annotated[
        list[str] | None, typer.Option("--other", help="A further test set as NAME=DATA; several.", metavar="NAME=DATA")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="File for the model's plain weights (.safetensors).")
    ] = None,
    batch_size: ForwardBatch = 64,
    weights: Weights = None,
    force: Force = False,
    workers: Workers = 0,
) -> None:
    """WiSE-FT: average the zero-shot model's weights with the adapted ones, often better under other conditions.

    Without --alpha eleven values from 0 to 1 are compared on the validation split. The test split and the other sets
    are scored for the chosen one, and for both ends to compare. A run folder keeps all in interpolation.json.

    Example: refold interpolate runs/clip --other sketches=sketches/ --output clip.safetensors
    """
    from refold.cli.finish import stopped
    from refold.export import export_weights
    from refold.report.tables import rich_table
    from refold.training.checkpoint import write_atomically
    from refold.training.zeroshot import interpolate_run

    try:
        found = interpolate_run(
            adapter, alpha, data=data, others=parse_pairs(other or [], "--other"), weights=weights, force=force,
            batch_size=batch_size, workers=workers,
        )  # fmt: skip
    except KeyboardInterrupt as stop:
        raise stopped(stop) from None
    console.print(rich_table(_grid(found)))
    if Path(adapter).is_dir():
        kept, text = Path(adapter) / "interpolation.json", json.dumps(found.to_json(), indent=2)
        write_atomically(kept, lambda file: file.write(text.encode()))
        console.print(f"Kept in {kept}", highlight=False)
    if output is not None:
        result = export_weights(found.model, output)
        console.print(f"Weights at alpha {found.alpha:g}: {result.path} ({result.bytes:,} bytes)", highlight=False)


def _grid(found: Interpolated) -> Grid:
    """One row an alpha: the metric on validation and on each set."""
    from refold.report.formats import metric
    from refold.report.grids import Grid, metric_title

    name = found.select or "accuracy"
    columns = {**({"validation": found.validation} if found.validation else {}), **found.metrics}
    alphas = sorted({at for values in columns.values() for at in values})
    rows = tuple(
        (f"{at:g}", *(metric(name, values.get(at, {}).get(name)) for values in columns.values())) for at in alphas
    )
    chosen = {(alphas.index(found.alpha), column): "good" for column in range(len(columns) + 1)}
    return Grid(f"{metric_title(name)} from zero-shot (0) to adapted (1)", ("alpha", *columns), rows, 0, chosen)
