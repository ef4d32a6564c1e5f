"""``refold vtab``, ``fewshot``, ``dg`` and ``suite``: the protocols of the papers, one command each."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from refold.cli.board import board
from refold.cli.console import console, is_main
from refold.cli.finish import stopped
from refold.cli.options import (
    BACKBONE,
    Address,
    Augment,
    BatchSize,
    ClassNames,
    Cpus,
    Data,
    Engine,
    Epochs,
    Gpus,
    Head,
    HeadRate,
    ImageSize,
    LearningRate,
    Model,
    Precision,
    Pretrained,
    Split,
    Target,
    Templates,
    TestList,
    TrainList,
    ValList,
    Weights,
    parse_engine,
    parse_method,
    parse_numbers,
    parse_pairs,
)

if TYPE_CHECKING:
    from refold.protocols import Standing
    from refold.protocols.vtab_run import TaskResult
    from refold.report import grids
    from refold.training import TrainConfig

__all__ = ["dg", "fewshot", "suite", "vtab"]

Grid = Annotated[
    list[str] | None,
    typer.Option(
        help="Candidates chosen on validation images, such as 'lr=1e-3,1e-2'; several combine. Each method takes what "
        "it, or the recipe, has.",
        show_default=False,
    ),
]
Methods = Annotated[list[str], typer.Option("--method", help="Method and hyper-parameters; several are compared.")]
Output = Annotated[Path, typer.Option("--output", "-o", help="Folder to write; finished trainings are kept.")]
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
            "The scales 0.1, 0.5, 1, 5, 10 of methods that have one, unless METHOD sets it, if not given; 'none' "
            "searches nothing.",
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
        typer.Option(
            "--prepare",
            help="Make the lists, from the sets as they are downloaded or from TASK/train and TASK/test with a folder "
            "per class, and stop.",
        ),
    ] = False,
    originals: Annotated[
        Path | None,
        typer.Option(
            help="For --prepare: where the downloads lie, as torchvision puts them; the root if not given.",
            show_default=False,
        ),
    ] = None,
    output: Output = Path("runs/vtab"),
    weights: Weights = None,
    epochs: Annotated[int, typer.Option(help="Of each training.")] = 100,
    batch_size: BatchSize = None,
    lr: LearningRate = 1e-3,
    head_lr: HeadRate = None,
    image_size: ImageSize = None,
    precision: Precision = "auto",
    pretrained: Pretrained = True,
    workers: Workers = 0,
    engine: Engine = "sequential",
    address: Address = None,
    cpus: Cpus = None,
    gpus: Gpus = None,
) -> None:
    """VTAB-1k: 19 tasks of 1000 images, their group means and averages, with nothing chosen on test.

    Example: refold vtab --root data/vtab-1k --method RepAdapter --seeds 0,1,2 -o runs/vtab

    Example: refold vtab --root data/vtab-1k --tasks cifar,dtd --method "LoRA(rank=8)" --grid lr=1e-3,1e-2

    Example: refold vtab --root data/vtab-1k --prepare --originals downloads/ --tasks cifar,svhn
    """
    from refold.errors import DataError
    from refold.protocols import TASKS, find_tasks, parse_grid, run_vtab
    from refold.protocols import prepare as make_lists
    from refold.report.protocols import vtab_grid
    from refold.report.sweeps import trainings_grid
    from refold.training import TrainConfig

    names = None if tasks is None else [name.strip() for name in tasks.split(",")]
    if originals is not None and not prepare:
        raise DataError("is where --prepare finds the downloads", where="--originals", remedy="Add --prepare")
    if prepare:
        make_lists(
            root,
            names,
            originals=originals,
            on_task=lambda name, notes: console.print(f"{name}: {'; '.join(notes)}", highlight=False),
        )
        console.print(f"{len(find_tasks(root, names))} tasks are ready in {root}", highlight=False)
        return
    chosen = parse_method(method)
    texts = [] if grid == ["none"] else grid
    if texts is None:
        usual = getattr(type(chosen), "scale", None)  # of a dataclass, the default
        texts = ["scale=0.1,0.5,1,5,10"] if usual is not None and getattr(chosen, "scale", None) == usual else []
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
    main, many = is_main(), parse_engine(engine, address, cpus, gpus)

    def on_task(row: TaskResult) -> None:
        if main:
            accuracy = f"{100 * row.accuracy.mean:.1f} %"
            console.print(f"{TASKS[row.name].title}: {accuracy} ({row.point})", highlight=False)

    def line(standing: Standing) -> str:
        return f"{standing.name}: {standing.status}"

    try:
        with nullcontext() if many is None else board(trainings_grid, line) as on_job:
            result = run_vtab(
                config,
                tasks=names,
                grid=parse_grid(texts, [chosen])[0],
                seeds=parse_numbers(seeds, "--seeds"),
                published_protocol=published_protocol,
                engine=many,
                progress=None,
                on_task=on_task,
                on_job=on_job,
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
    output: Output = Path("runs/fewshot"),
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
    head: Head = "linear",
    template: Templates = None,
    class_names: ClassNames = None,
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
        head=head, templates=tuple(template or ()) or None, class_names=class_names,
    )  # fmt: skip
    main = is_main()
    try:
        result = run_few_shot(
            config, [parse_method(text) for text in method], shots=parse_numbers(shots, "--shots"),
            seeds=parse_numbers(seeds, "--seeds"), grid=grid or (), progress=None,
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
    output: Output = Path("runs/dg"),
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
    head: Head = "linear",
    template: Templates = None,
    class_names: ClassNames = None,
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
        head=head, templates=tuple(template or ()) or None, class_names=class_names,
    )  # fmt: skip
    main = is_main()
    try:
        result = run_domains(
            config, [parse_method(text) for text in method], parse_pairs(other, "--other"),
            mappings=parse_pairs(mapping or [], "--mapping"), shots=shots, seeds=parse_numbers(seeds, "--seeds"),
            grid=grid or (), progress=None,
            on_row=lambda row: _tell(main, f"{row.method}: {row.average.percent()} % on the other sets"),
        )  # fmt: skip
    except KeyboardInterrupt as stop:
        raise stopped(stop) from None
    if main:
        _show(domain_grid(result), output)


def suite(
    data: Annotated[list[str], typer.Argument(help="Data sets as NAME=DATA.", metavar="NAME=DATA...")],
    model: Model = BACKBONE,
    method: Methods = ["RepAdapter"],  # noqa: B006 (typer reads it)
    seeds: Seeds = "0,1,2",
    grid: Grid = None,
    output: Output = Path("runs/suite"),
    weights: Weights = None,
    split: Split = (0.6, 0.2, 0.2),
    epochs: Epochs = 100,
    batch_size: BatchSize = None,
    lr: LearningRate = 1e-3,
    head_lr: HeadRate = None,
    augment: Augment = "none",
    image_size: ImageSize = None,
    normalize: Normalize = "model",
    head: Head = "linear",
    template: Templates = None,
    class_names: ClassNames = None,
    precision: Precision = "auto",
    pretrained: Pretrained = True,
    workers: Workers = 0,
) -> None:
    """Several methods on several data sets, and the mean: FGVC's five sets, or your own.

    Example: refold suite cub=CUB/ birds=nabirds/ flowers=flowers/ --method RepAdapter --method SSF --grid lr=1e-3,5e-3
    """
    from refold.protocols import run_suite
    from refold.report.protocols import suite_grid

    sets = parse_pairs(data, "NAME=DATA")
    config = _config(
        next(iter(sets.values())), model, output, False, weights=weights, fractions=split, epochs=epochs,
        batch_size=batch_size, lr=lr, head_lr=head_lr, augment=augment, image_size=image_size, normalize=normalize,
        precision=precision, pretrained=pretrained, workers=workers, head=head, templates=tuple(template or ()) or None,
        class_names=class_names,
    )  # fmt: skip
    main = is_main()
    try:
        result = run_suite(
            config, [parse_method(text) for text in method], sets, seeds=parse_numbers(seeds, "--seeds"),
            grid=grid or (), progress=None,
            on_row=lambda row: _tell(main, f"{row.method}, {row.data}: {row.accuracy.percent()} %"),
        )  # fmt: skip
    except KeyboardInterrupt as stop:
        raise stopped(stop) from None
    if main:
        _show(suite_grid(result), output)


def _config(data: str, model: str, output: Path, published: bool, **settings: Any) -> TrainConfig:
    import refold
    from refold.protocols import PUBLISHED_RECIPE
    from refold.training import TrainConfig

    recipe = PUBLISHED_RECIPE if published else {}
    return TrainConfig.of(data=data, model=model, output=output, method=refold.LinearProbe(), **settings | recipe)


def _tell(main: bool, message: str) -> None:
    if main:
        console.print(message, highlight=False)


def _show(table: grids.Grid, output: Path) -> None:
    from refold.report.tables import markdown_table, rich_table

    (output / "results.md").write_text(f"{table.title}\n\n{markdown_table(table)}", encoding="utf-8")
    console.print(rich_table(table))
    console.print(f"Results: {output / 'results.json'}, {output / 'results.md'}", highlight=False)
