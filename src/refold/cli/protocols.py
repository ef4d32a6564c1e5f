"""``refold vtab``, ``fewshot``, ``dg`` and ``robustness``: the protocols of the papers, one command each."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from refold.cli.console import console
from refold.cli.finish import stopped
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
    Split,
    Target,
    TestList,
    TrainList,
    ValList,
    Weights,
    parse_method,
)

if TYPE_CHECKING:
    from refold.report import grids
    from refold.training import TrainConfig

__all__ = ["dg", "fewshot", "robustness", "vtab"]

Grid = Annotated[
    list[str] | None,
    typer.Option(
        help="Candidates chosen on validation images, such as 'lr=1e-3,1e-2'; several combine. Each method takes what "
        "it, or the recipe, has.",
        show_default=False,
    ),
]
Methods = Annotated[list[str], typer.Option("--method", help="Method and hyper-parameters; several are compared.")]
Normalize = Annotated[
    str,
    typer.Option(help="Inputs: model, imagenet (most papers), inception (as the .npz ViTs were trained) or none."),
]
Workers = Annotated[int, typer.Option(help="Processes that decode data sets too large for memory.")]
Seeds = Annotated[str, typer.Option(help="Of draw and training, with commas between.")]
Published = Annotated[
    bool,
    typer.Option(
        "--published-recipe",
        help="The papers' augmentation: RandAugment, random erasing, mixup 0.8, cutmix 1.0, label smoothing 0.1.",
    ),
]


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
    normalize: Normalize = "imagenet",
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
    workers: Workers = 0,
) -> None:
    """VTAB-1k: 19 tasks of 1000 images, their group means and averages, with nothing chosen on test.

    Example: refold vtab --root data/vtab-1k --method RepAdapter --seeds 0,1,2 -o runs/vtab

    Example: refold vtab --root data/vtab-1k --tasks cifar,dtd --method "LoRA(rank=8)" --grid lr=1e-3,1e-2
    """
    from refold.protocols import TASKS, find_tasks, parse_grid, run_vtab
    from refold.protocols import prepare as make_lists
    from refold.report.protocols import vtab_grid
    from refold.training import TrainConfig

    names = None if tasks is None else [name.strip() for name in tasks.split(",")]
    if prepare:
        for name, notes in make_lists(root, names).items():
            console.print(f"{name}: {'; '.join(notes)}", highlight=False)
        console.print(f"{len(find_tasks(root, names))} tasks are ready in {root}", highlight=False)
        return
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
    main = _is_main()
    try:
        result = run_vtab(
            config,
            tasks=names,
            grid=parse_grid(texts, [chosen])[0],
            seeds=_numbers(seeds, "--seeds"),
            published_protocol=published_protocol,
            progress=None,
            on_task=lambda row: (
                console.print(
                    f"{TASKS[row.name].title}: {100 * row.accuracy.mean:.1f} % ({row.point})", highlight=False
                )
                if main
                else None
            ),
        )
    except KeyboardInterrupt as stop:
        raise stopped(stop) from None
    if main:
        _show(vtab_grid(result), output)


def fewshot(
    data: Data,
    model: Model = BACKBONE,
    method: Methods = ["RepAdapter"],  # noqa: B006 (typer reads it)
    shots: Annotated[str, typer.Option(help="Training images of each class, with commas between.")] = "1,2,4,8,16",
    seeds: Seeds = "0,1,2",
    grid: Grid = None,
    published_recipe: Published = False,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder to write; finished trainings are kept.")
    ] = Path("runs/fewshot"),
    weights: Weights = None,
    train_list: TrainList = None,
    val_list: ValList = None,
    test_list: TestList = None,
    target: Target = None,
    split: Split = (0.5, 0.0, 0.5),
    epochs: Epochs = 100,
    batch_size: BatchSize = None,
    lr: LearningRate = 1e-3,
    head_lr: HeadRate = None,
    augment: Augment = "none",
    image_size: ImageSize = None,
    normalize: Normalize = "model",
    precision: Precision = "auto",
    pretrained: Pretrained = True,
    workers: Workers = 0,
) -> None:
    """Few-shot curves: test accuracy against training images of each class, several methods side by side.

    Example: refold fewshot pets/ --method RepAdapter --method "LoRA(rank=8)" --method LinearProbe --published-recipe
    """
    from refold.protocols import run_few_shot
    from refold.report import figures
    from refold.report.protocols import few_shot_curves, few_shot_grid

    config = _config(
        data, model, output, published_recipe, weights=weights, train=train_list, val=val_list, test=test_list,
        target=target, fractions=split, epochs=epochs, batch_size=batch_size, lr=lr, head_lr=head_lr, augment=augment,
        image_size=image_size, normalize=normalize, precision=precision, pretrained=pretrained, workers=workers,
    )  # fmt: skip
    main = _is_main()
    try:
        result = run_few_shot(
            config, [parse_method(text) for text in method], shots=_numbers(shots, "--shots"),
            seeds=_numbers(seeds, "--seeds"), grid=grid or (), progress=None,
            on_row=lambda row: _tell(main, f"{row.method}, {row.shots} shots: {row.accuracy.percent()} %"),
        )  # fmt: skip
    except KeyboardInterrupt as stop:
        raise stopped(stop) from None
    if main:
        curves = figures.save(few_shot_curves(result), output / "curves.png")
        _show(few_shot_grid(result), output)
        console.print(f"Curves: {curves}", highlight=False)


def dg(
    data: Data,
    other: Annotated[
        list[str], typer.Option("--other", help="A further test set as NAME=DATA; several.", metavar="NAME=DATA")
    ],
    mapping: Annotated[
        list[str] | None,
        typer.Option(
            help="Classes of a further set as NAME=CSV with lines CLASS,SOURCE_CLASS; the same names if not given.",
            metavar="NAME=CSV",
        ),
    ] = None,
    model: Model = BACKBONE,
    method: Methods = ["RepAdapter"],  # noqa: B006 (typer reads it)
    shots: Annotated[int | None, typer.Option(help="Training images of each class; all if not given.")] = None,
    seeds: Seeds = "0,1,2",
    grid: Grid = None,
    published_recipe: Published = False,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder to write; finished trainings are kept.")
    ] = Path("runs/dg"),
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
    image_size: ImageSize = None,
    normalize: Normalize = "model",
    precision: Precision = "auto",
    pretrained: Pretrained = True,
    workers: Workers = 0,
) -> None:
    """Domain generalization: trained on one set, tested on others with the same classes, or some of them.

    Example: refold dg imagenet/ --shots 16 --other v2=imagenet-v2/ --other r=imagenet-r/ --mapping v2=v2.csv
    """
    from refold.protocols import run_domains
    from refold.report.protocols import domain_grid

    config = _config(
        data, model, output, published_recipe, weights=weights, train=train_list, val=val_list, test=test_list,
        target=target, fractions=split, epochs=epochs, batch_size=batch_size, lr=lr, head_lr=head_lr, augment=augment,
        image_size=image_size, normalize=normalize, precision=precision, pretrained=pretrained, workers=workers,
    )  # fmt: skip
    main = _is_main()
    try:
        result = run_domains(
            config, [parse_method(text) for text in method], _pairs(other, "--other"),
            mappings=_pairs(mapping or [], "--mapping"), shots=shots, seeds=_numbers(seeds, "--seeds"),
            grid=grid or (), progress=None,
            on_row=lambda row: _tell(main, f"{row.method}: {row.average.percent()} % on the other sets"),
        )  # fmt: skip
    except KeyboardInterrupt as stop:
        raise stopped(stop) from None
    if main:
        _show(domain_grid(result), output)


def robustness(
    adapters: Annotated[
        list[str], typer.Argument(help="Run folders or adapter files, on one backbone.", metavar="ADAPTER...")
    ],
    data: Annotated[
        str | None, typer.Option(help="Labelled images; those of the first run folder if not given.")
    ] = None,
    split: Annotated[str, typer.Option(help="train, val or test.")] = "test",
    corruptions: Annotated[
        str | None, typer.Option(help="Names with commas between, or none; all if not given.")
    ] = None,
    severities: Annotated[str, typer.Option(help="1 to 5, with commas between.")] = "1,2,3,4,5",
    batch_size: Annotated[int, typer.Option(help="Images of a forward pass.")] = 64,
    weights: Weights = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="JSON file to write.")] = None,
) -> None:
    """Common corruptions, calibration, whose mistakes differ, and the ensemble of adapters on one backbone.

    Example: refold robustness runs/repadapter runs/lora -o robustness.json

    Example: refold robustness runs/a --corruptions gaussian_noise,jpeg --severities 3
    """
    from refold.protocols import examine
    from refold.report.protocols import pairs_grid, robustness_grid
    from refold.report.tables import rich_table

    names = None if corruptions is None else [name.strip() for name in corruptions.split(",")]
    result = examine(
        adapters,
        data,
        split=split,
        corruptions=[] if names == ["none"] else names,
        severities=_numbers(severities, "--severities"),
        batch_size=batch_size,
        weights=weights,
        output=output,
    )
    if not _is_main():
        return
    console.print(rich_table(robustness_grid(result)))
    if result.pairs:
        console.print(rich_table(pairs_grid(result)))
    if output is not None:
        console.print(f"Results: {output}", highlight=False)


def _config(data: str, model: str, output: Path, published: bool, **settings: Any) -> TrainConfig:
    import refold
    from refold.protocols import PUBLISHED_RECIPE
    from refold.training import TrainConfig

    recipe = PUBLISHED_RECIPE if published else {}
    return TrainConfig.of(data=data, model=model, output=output, method=refold.LinearProbe(), **settings | recipe)


def _is_main() -> bool:
    from accelerate import PartialState

    return PartialState().is_main_process


def _tell(main: bool, message: str) -> None:
    if main:
        console.print(message, highlight=False)


def _show(table: grids.Grid, output: Path) -> None:
    from refold.report.tables import markdown_table, rich_table

    (output / "results.md").write_text(f"{table.title}\n\n{markdown_table(table)}", encoding="utf-8")
    console.print(rich_table(table))
    console.print(f"Results: {output / 'results.json'}, {output / 'results.md'}", highlight=False)


def _numbers(text: str, where: str) -> list[int]:
    from refold.errors import DataError

    numbers = [number.strip() for number in text.split(",")]
    if not all(number.isdecimal() for number in numbers):
        raise DataError(f"must be whole numbers with commas between, not {text!r}", where=where)
    return [int(number) for number in numbers]


def _pairs(texts: list[str], where: str) -> dict[str, str]:
    from refold.errors import DataError

    found: dict[str, str] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not (name and equals and value) or name in found:
            raise DataError(f"cannot read {text!r}", where=where, remedy="Write NAME=PATH, each name once")
        found[name] = value
    return found
