"""``refold sweep``: many trainings, compared on validation images."""

from __future__ import annotations

import inspect
import shlex
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from refold.cli import adapt
from refold.cli.board import board
from refold.cli.console import console, error
from refold.cli.finish import stopped
from refold.cli.options import Address, Cpus, Engine, Gpus, parse_engine, parse_method, parse_numbers
from refold.errors import DataError

if TYPE_CHECKING:
    from refold.sweeps import Row, Trial
    from refold.training import TrainConfig

__all__ = ["command_line", "sweep"]

#: Options of ``refold train`` that are called otherwise in its config.
_FIELDS = {
    "train_list": "train",
    "val_list": "val",
    "test_list": "test",
    "split": "fractions",
    "template": "templates",
}
#: Options that a sweep has in its own form, or not at all.
_OTHERWISE = ("method", "output", "seed", "resume")

Methods = Annotated[list[str], typer.Option("--method", help="Method and hyper-parameters; several are compared.")]
Output = Annotated[Path, typer.Option("--output", "-o", help="Folder to write; finished trials are kept.")]


def sweep(**options: Any) -> None:
    """Train many times and rank by validation images; the same command goes on after a stop.

    OUTPUT/trials holds an ordinary run folder for each; OUTPUT/best.sh trains the best again, and scores it on the test
    split, which nothing else looks at.

    Example: refold sweep photos/ --grid lr=1e-3,5e-3 --grid scale=0.1,1,5 --seeds 0,1,2 -o runs/sweep

    Example: refold sweep photos/ --method RepAdapter --method "LoRA(rank=8)" --grid lr=1e-4,1e-3,1e-2 --search asha
    --engine ray
    """
    own = {name: options.pop(name) for name in _own()}
    _sweep(options, **own)


def _sweep(
    shared: dict[str, Any],
    *,
    method: Methods = ["RepAdapter"],  # noqa: B006 (typer reads it)
    grid: Annotated[
        list[str] | None,
        typer.Option(
            help="Candidates such as 'lr=1e-3,5e-3', of the method or the recipe; several combine. Each method takes "
            "those it, or the recipe, has.",
            show_default=False,
        ),
    ] = None,
    search: Annotated[
        str,
        typer.Option(
            help="grid: all combinations; random: --samples of them; asha: all, or --samples, by successive halving."
        ),
    ] = "grid",
    samples: Annotated[int | None, typer.Option(help="Combinations to draw.")] = None,
    seeds: Annotated[str, typer.Option(help="Of each candidate, with commas between; one for asha.")] = "0",
    grace: Annotated[int, typer.Option(help="asha: epochs after which trials are first compared.")] = 1,
    reduction: Annotated[int, typer.Option(help="asha: one trial in so many goes on, so many times as long.")] = 3,
    engine: Engine = "sequential",
    address: Address = None,
    cpus: Cpus = None,
    gpus: Gpus = None,
    output: Output = Path("runs/sweep"),
) -> None:
    from refold.report.sweeps import ranking_grid, trials_grid
    from refold.report.tables import markdown_table, rich_table
    from refold.sweeps import run_sweep
    from refold.sweeps.run import make_trials

    methods = [parse_method(text) for text in method]
    numbers = parse_numbers(seeds, "--seeds")
    config = _config(shared | {"method": methods[0], "output": output, "seed": numbers[0]})
    for trial in make_trials(config, methods, grid or [], numbers, samples):
        command_line(_again(trial, output))  # complains now of what the command could not say
    try:
        with board(trials_grid, _line) as tell:
            result = run_sweep(
                config, grid or [], methods=methods, search=search, samples=samples, seeds=numbers, grace=grace,
                reduction=reduction, engine=parse_engine(engine, address, cpus, gpus), on_row=tell,
            )  # fmt: skip
    except KeyboardInterrupt as stop:
        raise stopped(stop) from None
    table = ranking_grid(result)
    (output / "results.md").write_text(f"{table.title}\n\n{markdown_table(table)}", encoding="utf-8")
    command = shlex.join(command_line(_again(result.best, output)))
    script = output / "best.sh"
    script.write_text(f"#!/bin/sh\ncd {shlex.quote(str(Path.cwd()))} || exit\n{command}\n", encoding="utf-8")
    script.chmod(0o755)
    console.print(rich_table(table))
    for row in result.rows:
        if row.status == "failed":
            error(f"{row.trial.candidate}, seed {row.trial.config.seed}: {row.reason}")
    files = [output / "results.json", *([result.parquet] if result.parquet else []), output / "results.md"]
    console.print(f"Results: {', '.join(map(str, files))}", highlight=False)
    if result.parquet is None:
        console.print("No results.parquet without pyarrow: pip install 'refold[sweep]'", highlight=False, markup=False)
    console.print(f"Best: {result.best.config.output}", highlight=False)
    console.print(
        f"Once more, with the test split ({script}):\n{command}", highlight=False, markup=False, soft_wrap=True
    )


def _own() -> list[str]:
    return [name for name in inspect.signature(_sweep).parameters if name != "shared"]


def _signature() -> inspect.Signature:
    """The options of ``refold train`` as they are, and those of a sweep."""
    parameters = [
        parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
        for function in (adapt.train, _sweep)
        for name, parameter in inspect.signature(function, eval_str=True).parameters.items()
        if name != "shared" and not (function is adapt.train and name in _OTHERWISE)
    ]
    return inspect.Signature(parameters)


sweep.__signature__ = _signature()  # pyright: ignore[reportFunctionMemberAccess]  (typer reads it)


def _config(options: dict[str, Any]) -> TrainConfig:
    """The config that ``refold train`` makes of its options; what is not given is left to the config."""
    from refold.training import TrainConfig

    settings = {}
    for name, value in options.items():
        given = tuple(value) or None if isinstance(value, list | tuple) else value
        if given is not None:
            settings[_FIELDS.get(name, name)] = given
    return TrainConfig.of(**settings)


def _again(trial: Trial, output: Path) -> TrainConfig:
    """The training that ``best.sh`` starts: that of the trial, with the test split."""
    return trial.config.replace(output=str(output / "best"), evaluate_test=True)


def command_line(config: TrainConfig) -> list[str]:
    """``refold train ...`` as words that make this config; what it would be without is not said.

    Raises:
        DataError: a setting that the command has no option for.
    """
    only = typer.Typer(add_completion=False)
    only.command()(adapt.train)
    command = typer.main.get_command(only)
    said: dict[str, list[str]] = {}
    for option in command.params:
        name = _FIELDS.get(option.name or "", option.name or "")
        if name in ("data", "resume"):
            continue
        value = _spoken(config.method) if name == "method" else getattr(config, name)
        if value == option.default or value is None:
            continue
        if isinstance(value, bool):
            said[name] = [(option.opts if value else option.secondary_opts)[0]]
        elif option.multiple:
            said[name] = [word for one in value for word in (option.opts[0], one)]
        else:
            said[name] = [option.opts[0], *map(str, value if isinstance(value, tuple) else (value,))]

    def words(names: Iterable[str]) -> list[str]:
        return [config.data, *(word for name in names for word in said[name])]

    def understood(names: Iterable[str]) -> dict[str, Any]:
        options = dict(command.make_context("train", words(names)).params)
        del options["resume"]
        return _config(options | {"method": parse_method(options["method"])}).to_json()

    wanted = config.to_json()
    try:
        heard = understood(said)
    except DataError as problem:  # a setting without an option, whose default does not go with the others
        raise _unsaid(problem.where or "", config) from problem
    for name, value in wanted.items():
        if heard[name] != value:
            raise _unsaid(name, config)
    for name in tuple(said):  # some defaults are decided by the config itself
        rest = [other for other in said if other != name]
        with suppress(DataError):  # the others do not go together without it
            if understood(rest) == wanted:
                del said[name]
    return ["refold", "train", *words(said)]


def _unsaid(name: str, config: TrainConfig) -> DataError:
    value = getattr(config, name, None)
    return DataError(f"`refold train` has no option for {value!r}", where=name, remedy="Sweep in Python: refold.sweep")


def _spoken(method: Any) -> str:
    """A method as ``--method`` takes it."""
    from refold.methods import Compose

    if isinstance(method, Compose):
        return " + ".join(map(_spoken, method.methods))
    text = method.describe()
    return text.removesuffix("()")


def _line(row: Row) -> str:
    from refold.report.formats import metric

    state = f"{row.status}, epoch {row.epochs} of {row.planned}, {metric(row.metric, row.value)}"
    return f"{row.trial.candidate}, seed {row.trial.config.seed}: {state}"
