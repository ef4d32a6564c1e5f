"""``refold search``: the size of every adapter, found on the validation split."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, cast

import typer

from refold.cli.console import console
from refold.cli.finish import show_result, stopped
from refold.cli.options import (
    BACKBONE,
    Augment,
    BatchSize,
    Data,
    Epochs,
    HeadRate,
    ImageSize,
    LearningRate,
    Model,
    Precision,
    Pretrained,
    Resume,
    Seed,
    Select,
    Split,
    Target,
    TestList,
    TrainList,
    ValList,
    Weights,
    parse_method,
)

__all__ = ["search"]

_METHODS = ("noah",)


def search(
    data: Data,
    method: Annotated[str, typer.Option(help="How to search: noah.")] = "noah",
    model: Model = BACKBONE,
    space: Annotated[
        str, typer.Option(help="VPT, LoRA, Adapter or AdaptFormer, each in its largest size, with + between.")
    ] = "VPT(tokens=10) + LoRA(rank=10) + Adapter(variant='noah', hidden=10)",
    choices: Annotated[str, typer.Option(help="Sizes an adapter may have; 0 leaves it out.")] = "0,1,5,10",
    cap: Annotated[
        int | None, typer.Option(help="Most parameters beside the head; all the space has if not given.")
    ] = None,
    supernet_epochs: Annotated[int | None, typer.Option(help="Of the super-net; five times --epochs if not given.")] = (
        None
    ),
    evaluations: Annotated[int, typer.Option(help="Sub-nets to score on the validation split.")] = 800,
    population: Annotated[int, typer.Option(help="Sub-nets of a generation.")] = 50,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write.")] = Path("runs/search"),
    weights: Weights = None,
    train_list: TrainList = None,
    val_list: ValList = None,
    test_list: TestList = None,
    target: Target = None,
    split: Split = (0.8, 0.2, 0.0),
    epochs: Epochs = 100,
    batch_size: BatchSize = None,
    lr: LearningRate = 1e-3,
    head_lr: HeadRate = None,
    augment: Augment = "none",
    precision: Precision = "auto",
    image_size: ImageSize = None,
    select: Select = None,
    seed: Seed = 0,
    pretrained: Pretrained = True,
    resume: Resume = False,
) -> None:
    """Find the best size of every adapter on the validation split, and train what was found.

    The winner's run folder is OUTPUT/best, its method is in OUTPUT/search.json.

    Example: refold search photos/ --method noah --cap 300000 -o runs/noah
    """
    from refold.errors import DataError
    from refold.search import noah
    from refold.training import TrainConfig

    if method not in _METHODS:
        raise DataError(f"must be one of {', '.join(_METHODS)}, not {method!r}", where="--method")
    sizes = [part.strip() for part in choices.split(",")]
    if not all(size.isdecimal() for size in sizes):
        raise DataError(f"must be whole numbers with commas between, not {choices!r}", where="--choices")
    config = TrainConfig(
        data=data,
        model=model,
        method=parse_method(space, "--space"),
        output=str(output),
        weights=None if weights is None else str(weights),
        train=train_list,
        val=val_list,
        test=test_list,
        target=target,
        fractions=split,
        epochs=epochs,
        batch_size=cast(int, batch_size),
        lr=lr,
        head_lr=head_lr,
        augment=augment,
        precision=precision,
        image_size=image_size,
        select=select,
        seed=seed,
        pretrained=pretrained,
    )
    try:
        found = noah(
            config,
            choices=[int(size) for size in sizes],
            cap=cap,
            supernet_epochs=supernet_epochs,
            evaluations=evaluations,
            population=population,
            resume=resume,
            progress=None,
        )
    except KeyboardInterrupt as stop:
        raise stopped(stop) from None
    console.print(f"Found: {found.method.describe()}\n  {found.best.parameters:,} parameters", highlight=False)
    show_result(found.result, found.method, output / "best")
