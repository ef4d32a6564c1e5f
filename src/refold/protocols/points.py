"""Grids of settings: hyper-parameters of a method, and the numbers of a recipe."""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, NoReturn

from refold.errors import DataError
from refold.methods import Method
from refold.training.config import TrainConfig

__all__ = ["Point", "parse_grid", "points"]

#: Settings of a recipe that a grid may hold; all others are a method's.
_RECIPE = ("lr", "head_lr", "weight_decay", "epochs", "batch_size", "label_smoothing", "mixup", "cutmix", "drop_path")


@dataclass(frozen=True)
class Point:
    """One candidate: (name, value) of every setting that differs from the base's."""

    values: tuple[tuple[str, Any], ...] = ()

    def __str__(self) -> str:
        return ", ".join(f"{name} {value}" for name, value in self.values) or "as given"

    @property
    def slug(self) -> str:
        """Its part of file names."""
        text = "-".join(f"{name}{value}" for name, value in self.values) or "given"
        return "".join(letter if letter.isalnum() or letter in "-._" else "_" for letter in text)

    def apply(self, config: TrainConfig) -> TrainConfig:
        """The config with these settings.

        Raises:
            DataError, SiteError: a setting that neither the recipe nor the method has, or a value out of range.
        """
        recipe = {name: value for name, value in self.values if name in _RECIPE}
        own = {name: value for name, value in self.values if name not in _RECIPE}
        for name in own:
            if name not in _fields(config.method):
                _refuse(name, config.method)
        method = dataclasses.replace(config.method, **own) if own else config.method  # type: ignore[type-var]
        if "lr" in recipe:  # the ends of the schedule keep their distance
            recipe |= {"min_lr": min(config.min_lr, recipe["lr"]), "warmup_lr": min(config.warmup_lr, recipe["lr"])}
        return config.replace(method=method, **recipe)


def points(grid: Mapping[str, Sequence[Any]]) -> list[Point]:
    """All combinations, in order; one empty point for an empty grid."""
    return [Point(tuple(zip(grid, values, strict=True))) for values in product(*grid.values())]


def parse_grid(texts: Sequence[str], methods: Sequence[Method]) -> list[dict[str, list[Any]]]:
    """``["scale=0.1,1,10", "lr=1e-3"]`` as name -> values: for each method, those that it or a recipe has.

    Raises:
        DataError: a text of another form, a name twice, or one that neither a recipe nor any of the methods has.
    """
    grid: dict[str, list[Any]] = {}
    for text in texts:
        name, equals, values = (part.strip() for part in text.partition("="))
        if not name or not equals or not values:
            raise DataError(f"cannot read {text!r}", where="--grid", remedy="Write for example scale=0.1,1,10")
        if name in grid:
            raise DataError(f"{name!r} is there twice", where="--grid")
        grid[name] = [_value(value.strip()) for value in values.split(",")]
    for name in grid:
        if name not in _RECIPE and not any(name in _fields(method) for method in methods):
            _refuse(name, methods[0])
    return [
        {name: values for name, values in grid.items() if name in (*_RECIPE, *_fields(method))} for method in methods
    ]


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _fields(method: Method) -> list[str]:
    return [field.name for field in dataclasses.fields(method)]  # type: ignore[arg-type]


def _refuse(name: str, method: Method) -> NoReturn:
    raise DataError(
        f"{type(method).__name__} has no {name!r}",
        where="--grid",
        remedy=f"It has {', '.join(_fields(method))}; a recipe has {', '.join(_RECIPE)}",
    )
