"""Several dense tasks on one frozen encoder: a head for each, and an adapter for each or one for all.

The setting of "Effective Adaptation in Multi-Task Co-Training for Unified Autonomous Driving" (LV-Adapter, arXiv
2209.08953): segmentation and detection learn together while the pretrained weights stay as they are. Chosen here: a
step trains one task on one batch of its own data, and an epoch passes the data of every task once, evenly spread.

Tasks with adapters of their own share frozen weights only, so each learns what it would learn alone from the same
batches at the same learning rates. With one adapter for all they teach it together.

    encoder = load_encoder("timm/convnext_tiny").encoder
    model = MultiTask({"stuff": Segmenter(encoder, "fpn", 19), "cars": build_detector("fcos", encoder, 3, ...)})
    model.attach({"stuff": refold.RepAdapter(), "cars": refold.LoRA()})
    fit_tasks(model, {"stuff": load_masks(...), "cars": load_boxes(...)}, preprocessing, Recipe(epochs=12))
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from refold import hosting
from refold.attachment import attach, detach
from refold.dense.encoder import Encoder
from refold.dense.job import make_problem, require_dense
from refold.detection import BoxSplits
from refold.errors import DataError, SiteError
from refold.merging import switch
from refold.methods import Method
from refold.preprocessing import Preprocessing
from refold.segmentation import MaskSplits, Segmenter
from refold.state import State, state_of
from refold.store import save
from refold.training.loop import Solved, solve
from refold.training.metrics import lower_is_better
from refold.training.problem import Problem
from refold.training.recipe import Recipe
from refold.training.run import RunFolder

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["SHARED", "MultiTask", "MultiTaskProblem", "fit_tasks"]

#: Name of an adapter that serves all tasks.
SHARED = "shared"
#: The validation metric: the mean over the tasks of the one that each would choose its best epoch by.
_MEAN = "mean"


class MultiTask(nn.Module):
    """Dense models around one encoder; ``model(task, ...)`` runs the task's model with the task's adapter.

    Args:
        models: task -> :class:`refold.segmentation.Segmenter` or what :func:`refold.detection.build_detector` makes,
            all of them built on the very same encoder. A task's name is its adapter's: letters, digits and ``_``.

    Attributes:
        models: as above.

    Raises:
        DataError: no task, a name that no adapter can have, or models without an encoder in common.
    """

    def __init__(self, models: Mapping[str, nn.Module]) -> None:
        super().__init__()
        if not models:
            raise DataError("there is no task", where="models")
        first = next(iter(models))
        for task, model in models.items():
            if task == SHARED or not hosting.is_free_name(task):
                raise DataError(f"{task!r} cannot be a task's name", where="models", remedy="Use for example 'cars'")
            encoder = getattr(model, "encoder", None)
            if not isinstance(encoder, Encoder):
                raise DataError("its model has no encoder", where=task, remedy="Use a Segmenter or build_detector")
            if encoder is not getattr(models[first], "encoder", None):
                raise DataError(
                    f"its encoder is not that of {first!r}", where=task, remedy="Build all models on one encoder"
                )
        self.models = nn.ModuleDict(models)

    @property
    def tasks(self) -> list[str]:
        """Their names, in order."""
        return list(self.models)

    @property
    def body(self) -> nn.Module:
        """The backbone that all tasks share: what adapters are attached to."""
        return getattr(self.models[self.tasks[0]], "encoder").body  # noqa: B009 (typed as any module's attribute)

    def forward(self, task: str, *inputs: Any, **named: Any) -> Any:
        """What the task's model returns, with the task's adapter in use.

        Raises:
            DataError: an unknown task.
        """
        self.activate(task)
        return self.models[task](*inputs, **named)

    def attach(self, methods: Method | Mapping[str, Method], *, example: Any = None) -> MultiTask:
        """Freeze the backbone and put adapters on it: one for all tasks, or one for each, called as the task.

        Args:
            methods: a method, or task -> method.
            example: as for :func:`refold.attach`.

        Returns:
            itself.

        Raises:
            SiteError: as :func:`refold.attach`; the backbone has adapters; or methods of several tasks that would train
                the backbone's own parameters. The backbone is then as it was.
            DataError: not a method for every task.
        """
        if state_of(self.body) is not None:
            raise SiteError("the backbone has adapters already", where="attach", remedy="Call refold.detach first")
        named = {SHARED: methods} if isinstance(methods, Method) else dict(methods)
        if not isinstance(methods, Method):
            _require_tasks(self, named, "methods")
        try:
            for name, method in named.items():
                attach(self.body, method, name=name, trainable=(), example=example)
            self.activate(self.tasks[0])
        except SiteError:
            if state_of(self.body) is not None:
                detach(self.body)
            raise
        return self

    def activate(self, task: str) -> None:
        """Put the task's adapter in use, or fold it in where one is folded in; nothing to do without adapters.

        Unlike :func:`refold.activate` it leaves the adapters of the other tasks trainable, so that one optimizer can
        hold all of them: out of the graph they get no gradient, and where the gradient is None, as after torch's
        ``zero_grad()``, optimizers change neither parameters nor their averages.

        Raises:
            DataError: an unknown task.
            SiteError: the task has no adapter, or adapters of several tasks train the backbone's own parameters.
        """
        if task not in self.models:
            raise DataError(f"unknown task {task!r}", where="task", remedy=f"Known: {', '.join(self.tasks)}")
        state = state_of(self.body)
        if state is None:
            return
        name = _adapter_of(task, state)
        if state.merged is not None:
            switch(self.body, name)
            return
        # No adapter has values of its own for the backbone's tensors: all that differs is who acts in a layer.
        for slot in hosting.hosted(self.body).values():
            slot.active = name if name in slot.sites else None
            slot.requires_grad_(True)
        state.active = name

    def save(self, folder: str | Path) -> dict[str, Path]:
        """Write ``<task>.safetensors`` for every task: its adapter and all of its model but the backbone.

        Each is a file like any other dense model's: :func:`refold.load` reads it into the task's model.

        Returns:
            task -> file.

        Raises:
            SiteError, StoreError: as :func:`refold.save`.
        """
        found = {}
        for task, model in self.models.items():
            self.activate(task)
            found[task] = save(model, Path(folder) / f"{task}.safetensors")
        return found


def _adapter_of(task: str, state: State) -> str:
    """The adapter that serves a task: the one of its name, or the only one."""
    records = state.records
    if len(records) > 1:
        for name, record in records.items():
            if record.owned:
                raise SiteError(
                    f"its method {record.method.describe()} trains {record.owned[0]}, a part of the backbone that all "
                    "tasks share",
                    where=name,
                    remedy="Use one adapter for all tasks, or a method that trains adapters only",
                )
    if task in records:
        return task
    if len(records) > 1:
        raise SiteError(f"no adapter is called {task!r}", where="activate", remedy=f"Attached: {', '.join(records)}")
    return next(iter(records))


def _require_tasks(model: MultiTask, given: Mapping[str, Any], where: str) -> None:
    if set(given) != set(model.tasks):
        raise DataError(f"are for {sorted(given)}, the tasks are {sorted(model.tasks)}", where=where)


class MultiTaskProblem:
    """See :class:`refold.training.problem.Problem`. The problems of several tasks, their batches spread evenly.

    An epoch passes the data of every task once: batch k of a task's n is due at the share (k + 1/2) / n of the epoch,
    tasks with equal shares in their order. Metrics are called ``<task>_<metric>``; ``mean``, the mean over tasks of the
    metric that each selects by, chooses the best epoch. A task without a validation set does not count.

    Args:
        model: with adapters attached by :meth:`MultiTask.attach`.
        problems: task -> its own problem.
        accelerator: of the training loop.
        weights: task -> factor of its loss; None is 1 for all. It tells only where tasks share what they train: Adam's
            step does not depend on the size of a loss.

    Raises:
        DataError: several processes, not a problem (or weight) for every task, a weight that is not positive, or a task
            that selects by an error.
    """

    def __init__(
        self,
        model: MultiTask,
        problems: Mapping[str, Problem],
        accelerator: Accelerator,
        weights: Mapping[str, float] | None = None,
    ) -> None:
        if accelerator.num_processes > 1:
            raise DataError(
                "the graph of a step differs from task to task, which several processes cannot keep in step",
                where="accelerate launch",
                remedy="Train several tasks in one process",
            )
        _require_tasks(model, problems, "problems")
        self.weights = dict.fromkeys(model.tasks, 1.0) if weights is None else dict(weights)
        _require_tasks(model, self.weights, "weights")
        for task, weight in self.weights.items():
            if not (math.isfinite(weight) and weight > 0):
                raise DataError(f"must be positive, not {weight}", where=f"weights of {task}")
            if lower_is_better(problems[task].select):
                raise DataError(f"selects by {problems[task].select}, of which less is better", where=task)
        self.model, self.problems = model, {task: problems[task] for task in model.tasks}
        self.select = _MEAN
        self.images = sum(problem.images for problem in self.problems.values())
        self.order = _spread({task: problem.steps for task, problem in self.problems.items()})
        self.steps = len(self.order)
        self.facts = {
            "tasks": {task: dict(problem.facts) for task, problem in self.problems.items()},
            "weights": self.weights,
        }
        self._task = self.order[0]
        model.activate(self._task)

    def batches(
        self, epoch: int, seed: int, start: int = 0, state: dict[str, Any] | None = None
    ) -> Iterator[tuple[str, Any]]:
        """(task, batch of its problem)."""
        sources = {
            task: iter(problem.batches(epoch, seed, self.order[:start].count(task), state and state[task]))
            for task, problem in self.problems.items()
        }
        for task in self.order[start:]:
            self._task = task
            yield task, next(sources[task])

    def state(self) -> dict[str, Any]:
        return {task: problem.state() for task, problem in self.problems.items()}

    def step(self) -> AbstractContextManager[Any]:
        return self.problems[self._task].step()

    def loss(self, model: Any, batch: tuple[str, Any]) -> Tensor:
        task, own = batch
        model.activate(task)
        return self.weights[task] * self.problems[task].loss(model.models[task], own)

    def validate(self) -> dict[str, float] | None:
        rows: dict[str, float] = {}
        chosen = []
        for task, problem in self.problems.items():
            self.model.activate(task)
            found = problem.validate()
            if found is not None:
                rows |= {f"{task}_{metric}": value for metric, value in found.items()}
                chosen.append(found[problem.select])
        return {_MEAN: sum(chosen) / len(chosen), **rows} if chosen else None

    def try_step(self, size: int) -> list[Any]:
        outputs = []
        for task, problem in self.problems.items():
            self.model.activate(task)
            outputs.append(problem.try_step(min(size, problem.images)))
        return outputs


def _spread(steps: Mapping[str, int]) -> list[str]:
    """Tasks in the order of their batches; each as often as ``steps`` says."""
    due = [((2 * k + 1) / (2 * n), place, task) for place, (task, n) in enumerate(steps.items()) for k in range(n)]
    return [task for _, _, task in sorted(due)]


def fit_tasks(
    model: MultiTask,
    parts: Mapping[str, MaskSplits | BoxSplits],
    preprocessing: Preprocessing,
    recipe: Recipe,
    *,
    weights: Mapping[str, float] | None = None,
    folder: RunFolder | None = None,
    resume: bool = False,
    on_epoch: Callable[[dict[str, Any]], None] | None = None,
    progress: bool | None = False,
) -> Solved:
    """Train the adapters and heads of several tasks, and leave the model at its best epoch, in eval mode.

    Args:
        model: with adapters attached by :meth:`MultiTask.attach`.
        parts: task -> its data.
        preprocessing: of the encoder; its size is the crop of the segmentation tasks.
        recipe: how to optimise, the same for all. ``batch_size`` is of one task's batch, and ``augment`` one that all
            the tasks know.
        weights: as for :class:`MultiTaskProblem`.
        folder, resume, on_epoch, progress: as for :func:`refold.training.loop.solve`.

    Raises:
        DataError: data that are not a task's, a setting that is not for dense tasks, or as :class:`MultiTaskProblem`
            and :func:`refold.training.loop.solve`.
        SiteError: nothing is attached.
    """
    _require_tasks(model, parts, "parts")
    for task, part in parts.items():
        require_dense(recipe, task)
        own: Any = model.models[task]
        if isinstance(part, MaskSplits) != isinstance(own, Segmenter):
            raise DataError(f"{type(part).__name__} are not for a {type(own).__name__}", where=task)
        if own.classes != len(part.classes):
            raise DataError(f"has {own.classes} classes, its data {len(part.classes)}", where=task)
    if recipe.select is not None:
        raise DataError("the best epoch is chosen by the mean over tasks", where="select", remedy="Leave it out")
    if recipe.accumulate > 1:
        raise DataError("a step is one batch of one task", where="accumulate", remedy="Leave it out")
    if state_of(model.body) is None:
        raise SiteError("nothing is attached", where="fit_tasks", remedy="Call model.attach first")
    model.activate(model.tasks[0])  # whose flags say what trains: before the frozen weights change their precision

    def problem(accelerator: Accelerator, precision: str) -> MultiTaskProblem:
        problems = {
            task: make_problem(model.models[task], part, preprocessing, recipe)(accelerator, precision)
            for task, part in parts.items()
        }
        return MultiTaskProblem(model, problems, accelerator, weights)

    return solve(model, problem, recipe, folder=folder, resume=resume, on_epoch=on_epoch, progress=progress)
