"""``refold vtab``: the protocols of the papers, one command each."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, cast

import typer

from refold.cli.console import console
from refold.cli.finish import stopped
from refold.cli.options import (
    BACKBONE,
    BatchSize,
    HeadRate,
    ImageSize,
    LearningRate,
    Model,
    Precision,
    Pretrained,
    Weights,
    parse_method,
)

__all__ = ["vtab"]


def vtab(
    root: Annotated[Path, typer.Option(help="Folder with a folder for each task, in NOAH's layout.")],
    model: Model = BACKBONE,
    method: Annotated[str, typer.Option(help="Method and hyper-parameters.")] = "RepAdapter",
    tasks: Annotated[str | None, typer.Option(help="Names with commas between; all 19 if not given.")] = None,
    grid: Annotated[
        list[str] | None,
        typer.Option(
            help="Candidates chosen on val200, such as 'scale=0.1,0.5,1,5,10' or 'lr=1e-3,1e-2'; several combine. "
            "The scales 0.1, 0.5, 1, 5, 10 of methods that have one if not given; 'none' searches nothing.",
            show_default=False,
        ),
    ] = None,
    seeds: Annotated[str, typer.Option(help="Of the final trainings, with commas between.")] = "0",
    normalize: Annotated[
        str, typer.Option(help="Inputs: imagenet (most papers), inception (as the .npz backbone was trained) or none.")
    ] = "imagenet",
    published_protocol: Annotated[
        bool,
        typer.Option("--published-protocol", help="Choose epoch and candidate on the test set, as the papers' code."),
    ] = False,
    prepare: Annotated[
        bool,
        typer.Option("--prepare", help="List the images under TASK/train and TASK/test, a folder per class, and stop."),
    ] = False,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder to write; finished trainings are kept.")
    ] = Path("runs/vtab"),
    weights: Weights = None,
    epochs: Annotated[int, typer.Option(help="Of each training.")] = 100,
    batch_size: BatchSize = None,
    lr: LearningRate = 1e-3,
    head_lr: HeadRate = None,
    image_size: ImageSize = None,
    precision: Precision = "auto",
    pretrained: Pretrained = True,
    workers: Annotated[int, typer.Option(help="Processes that decode data sets too large for memory.")] = 0,
) -> None:
    """VTAB-1k: 19 tasks of 1000 images, their group means and averages, with nothing chosen on test.

    Example: refold vtab --root data/vtab-1k --method RepAdapter --seeds 0,1,2 -o runs/vtab

    Example: refold vtab --root data/vtab-1k --tasks cifar,dtd --method "LoRA(rank=8)" --grid lr=1e-3,1e-2
    """
    from accelerate import PartialState

    from refold.errors import DataError
    from refold.protocols import TASKS, find_tasks, parse_grid, run_vtab
    from refold.protocols import prepare as make_lists
    from refold.report.protocols import vtab_grid
    from refold.report.tables import markdown_table, rich_table
    from refold.training import TrainConfig

    names = None if tasks is None else [name.strip() for name in tasks.split(",")]
    if prepare:
        for name, notes in make_lists(root, names).items():
            console.print(f"{name}: {'; '.join(notes)}", highlight=False)
        console.print(f"{len(find_tasks(root, names))} tasks are ready in {root}", highlight=False)
        return
    numbers = [number.strip() for number in seeds.split(",")]
    if not all(number.isdecimal() for number in numbers):
        raise DataError(f"must be whole numbers with commas between, not {seeds!r}", where="--seeds")
    chosen = parse_method(method)
    texts = [] if grid == ["none"] else grid
    if texts is None:
        texts = ["scale=0.1,0.5,1,5,10"] if hasattr(chosen, "scale") else []
    config = TrainConfig(
        data=str(root),
        model=model,
        method=chosen,
        output=str(output),
        weights=None if weights is None else str(weights),
        epochs=epochs,
        batch_size=cast(int, batch_size),
        lr=lr,
        head_lr=head_lr,
        image_size=image_size,
        normalize=normalize,
        precision=precision,
        pretrained=pretrained,
        workers=workers,
    )
    main = PartialState().is_main_process
    try:
        result = run_vtab(
            config,
            tasks=names,
            grid=parse_grid(texts, chosen),
            seeds=[int(number) for number in numbers],
            published_protocol=published_protocol,
            progress=None,
            on_task=lambda row: (
                console.print(f"{TASKS[row.name].title}: {100 * row.mean:.1f} % ({row.point})", highlight=False)
                if main
                else None
            ),
        )
    except KeyboardInterrupt as stop:
        raise stopped(stop) from None
    if not main:
        return
    table = vtab_grid(result)
    (output / "results.md").write_text(f"{table.title}\n\n{markdown_table(table)}", encoding="utf-8")
    console.print(rich_table(table))
    console.print(f"Results: {output / 'results.json'}, {output / 'results.md'}", highlight=False)
