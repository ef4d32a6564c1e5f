"""NOAH: "Neural Prompt Search" (arXiv 2206.04673), from data to a trained sub-net.

A super-net holds VPT, LoRA and Adapter in their largest sizes; each step trains a random sub-net, which uses the first
rows of every tensor (weight entanglement). An evolutionary search (mutation, crossing, a cap on parameters) scores
sub-nets with the super-net's weights; the best one is trained on its own.

Deviations on purpose. From the paper: the winner's own training starts from its weights in the super-net, not from
noise; sub-nets are drawn under the cap while the super-net trains as well, so that what is trained is what is
searched. From the released code: its mutation changes up to which layer a module reaches and never a size, here any
size may change; its search scores sub-nets on images the super-net trained on (``train800val200``), here on the
validation split; its super-net is 100 wide though sizes are at most 10, here as wide as the largest size; layers
without an adapter may be anywhere, not only behind a depth.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

from torch import nn

import refold
from refold.errors import DataError, RefoldError
from refold.methods import Method
from refold.preprocessing import Preprocessing
from refold.search.evolution import Candidate, evolve
from refold.search.space import Sizes, Space
from refold.search.supernet import SuperNet
from refold.training.build import build_attached
from refold.training.checkpoint import check_same
from refold.training.config import TrainConfig
from refold.training.evaluation import load_splits, score
from refold.training.images import chosen_metric
from refold.training.inference import start_accelerator
from refold.training.job import TrainResult, train
from refold.training.loop import Fit, fit
from refold.training.metrics import lower_is_better
from refold.training.progress import show_count
from refold.training.run import RunFolder
from refold.training.tasks import plain_task

if TYPE_CHECKING:
    from refold.data import ImageSet, Splits

__all__ = ["Found", "noah"]


@dataclass(frozen=True)
class Found:
    """What :func:`noah` returns.

    Attributes:
        method: of the best sub-net, for :func:`refold.attach` and :func:`refold.train`.
        best: how it scored in the search.
        candidates: every sub-net that was scored, with the super-net's weights, in the order of the search.
        result: of its own training.
    """

    method: Method
    best: Candidate
    candidates: list[Candidate]
    result: TrainResult


def noah(
    config: TrainConfig,
    *,
    choices: Sequence[int] = (0, 1, 5, 10),
    cap: int | None = None,
    supernet_epochs: int | None = None,
    evaluations: int = 800,
    population: int = 50,
    resume: bool = False,
    progress: bool | None = None,
) -> Found:
    """Find the size of every adapter of a composition on the validation split, and train what was found.

    The folder ``config.output`` holds ``search.json`` (settings, every sub-net that was scored, the winner's method),
    ``start.safetensors`` (the winner with the super-net's weights), and two run folders: ``supernet/`` and ``best/``,
    the latter as :func:`refold.train` writes it.

    Args:
        config: of the winner's training. Its ``method`` is the super-net: one or more of VPT, LoRA, Adapter and
            AdaptFormer, each in its largest size. Its ``seed`` decides the search as well.
        choices: sizes an adapter may have, 0 being none; each method's own size is the largest that it takes.
        cap: the most parameters that a sub-net may have beside the head; None allows every one.
        supernet_epochs: passes of the super-net over the training images; None is five times ``config.epochs``, as in
            the paper.
        evaluations: sub-nets to score.
        population: of them in a generation; a fifth as many are the parents of the next.
        resume: go on with a search that was stopped: same arguments, same folder, and on the CPU the same result.
        progress: bars on standard error; None shows them on a terminal.

    Raises:
        DataError: a bad setting, no validation split, a folder in use, or a resumed search with other settings.
        SiteError: a method that cannot be searched, or choices or a cap that do not suit it.
        RefoldError: as :func:`refold.train`, or there is more than one process.
        KeyboardInterrupt: with a note that says how to resume.
    """
    for name, value in (("evaluations", evaluations), ("population", population), ("supernet_epochs", supernet_epochs)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise DataError(f"must be a whole number of at least 1, not {value!r}", where=name)
    if config.start is not None:
        raise DataError("a super-net starts as its methods do", where="start", remedy="Leave it out")
    if start_accelerator().num_processes > 1:
        raise RefoldError("a search runs in one process", remedy="Start it without accelerate launch")
    output = Path(config.output)
    training = config.replace(epochs=supernet_epochs or 5 * config.epochs, output=str(output / "supernet"))
    folder = RunFolder(training.output)
    folder.check(training, resume=resume)
    splits = load_splits(config)
    if splits.val is None:
        raise DataError("a search needs a validation split", where="data", remedy="Give fractions=, or val=")
    metric = chosen_metric(config, plain_task(splits.task, splits.classes), splits.val)
    model, preprocessing = build_attached(training, splits.task, splits.classes)
    net = SuperNet(model, Space.of(model, choices, cap))
    settings = {"choices": list(choices), "cap": cap, "evaluations": evaluations, "population": population}
    notes = _Notes(output, settings, net.space, metric)
    if resume:
        notes.read()
    _alone(net, net.space.sample(Random(config.seed)), config, splits)  # to fail before hours of training, not behind
    folder.open(training)
    notes.write()
    try:
        fitted = _train(net, splits, preprocessing, training, folder, resume=resume, progress=progress)
        score_one = _scorer(net, splits.val, preprocessing, training, fitted)
        with show_count(progress, "search", total=evaluations) as shown:
            candidates = evolve(
                net.space,
                lambda sizes: notes.candidate(sizes, score_one, shown),
                evaluations=evaluations,
                population=population,
                parents=max(1, population // 5),
                seed=config.seed,
            )
    except KeyboardInterrupt as stop:
        if not hasattr(stop, "__notes__"):
            stop.add_note(f"Stopped. The same command with --resume (in Python resume=True) goes on in {output}")
        raise
    best = max(candidates, key=lambda candidate: candidate.worth)
    method = net.space.method(best.sizes)
    small = _alone(net, best.sizes, config, splits)
    start = refold.save(small, output / "start.safetensors")
    notes.write(best=candidates.index(best), method=method.to_json())
    winner = config.replace(method=method, start=str(start), output=str(output / "best"))
    result = train(winner, resume=resume, progress=progress)
    return Found(method, best, candidates, result)


def _train(
    net: SuperNet,
    splits: Splits,
    preprocessing: Preprocessing,
    config: TrainConfig,
    folder: RunFolder,
    *,
    resume: bool,
    progress: bool | None,
) -> Fit:
    """Train the super-net, a sub-net a step; which one is a function of the seed and the step."""
    try:
        return fit(
            net.model,
            splits.train,
            None,
            preprocessing,
            config,
            task=splits.task,
            classes=splits.classes,
            folder=folder,
            resume=resume,
            before_step=lambda step: net.choose(net.space.sample(Random(f"{config.seed}/{step}"))),
            progress=progress,
        )
    finally:
        net.release()


def _alone(net: SuperNet, sizes: Sizes, config: TrainConfig, splits: Splits) -> nn.Module:
    """A fresh backbone with the sub-net's own method, and the weights that it has in the super-net."""
    model, _ = build_attached(config.replace(method=net.space.method(sizes)), splits.task, splits.classes)
    net.hand_down(sizes, model)
    return model


def _scorer(
    net: SuperNet, val_set: ImageSet, preprocessing: Preprocessing, config: TrainConfig, fitted: Fit
) -> Callable[[Sizes], dict[str, float]]:
    """The function that scores a sub-net on the validation split, in the precision of the training."""

    def score_one(sizes: Sizes) -> dict[str, float]:
        with net.chosen(sizes) as model:
            evaluation = score(
                model,
                val_set,
                val_set.targets,
                preprocessing,
                fitted.task,
                accelerator=start_accelerator(),
                batch_size=config.batch_size,
                workers=config.workers,
                precision=fitted.precision,
            )
        return evaluation.metrics

    return score_one


class _Notes:
    """``search.json``: what was scored so far, so that a search that was stopped does not score it again."""

    def __init__(self, folder: Path, settings: dict[str, Any], space: Space, metric: str) -> None:
        self.folder, self.settings, self.space, self.metric = RunFolder(folder), settings, space, metric
        self.metrics: dict[Sizes, dict[str, float]] = {}

    def read(self) -> None:
        """Take up what an earlier start noted.

        Raises:
            DataError: it began with other settings, or the file cannot be read.
        """
        path = self.folder.path / "search.json"
        if not path.exists():
            return
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            before, rows = data["settings"], data["candidates"]
            self.metrics = {tuple(map(int, row["sizes"].split())): row["metrics"] for row in rows}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"cannot be read ({error})", where=str(path), remedy="Remove it to search again") from error
        check_same(before, self.settings)

    def candidate(
        self, sizes: Sizes, score_one: Callable[[Sizes], dict[str, float]], shown: Callable[[int], None]
    ) -> Candidate:
        """A sub-net's score, from the notes or new."""
        if sizes not in self.metrics:
            self.metrics[sizes] = score_one(sizes)
            self.write()
        shown(len(self.metrics))
        metrics = self.metrics[sizes]
        value = metrics[self.metric]
        worth = (-value if lower_is_better(self.metric) else value, -metrics["loss"])
        return Candidate(sizes, self.space.cost(sizes), metrics, worth)

    def write(self, **more: Any) -> None:
        names = [type(method).__name__ for method in self.space.methods]
        places = [f"{names[place.site.part]} {place.site.path}" for place in self.space.places]
        rows = [
            {"sizes": " ".join(map(str, sizes)), "parameters": self.space.cost(sizes), "metrics": metrics}
            for sizes, metrics in self.metrics.items()
        ]
        content = {"settings": self.settings, "metric": self.metric, "places": places, "candidates": rows, **more}
        self.folder.write_json("search.json", content)
