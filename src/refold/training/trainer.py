"""The training loop: steps, epochs, validation, checkpoints.

Nothing in a step waits for the device: losses stay there and are looked at every few steps and at the end of
the epoch. All randomness is a function of (seed, epoch, process), so a run that goes on from the checkpoint of
an epoch computes what the uninterrupted run computes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from refold.attachment import param_groups
from refold.errors import RefoldError
from refold.training.attention import attention_kernel, choose_attention
from refold.training.checkpoint import Best, Checkpoint, check_same
from refold.training.config import FREE_SETTINGS, Recipe
from refold.training.metrics import lower_is_better
from refold.training.problem import Problem
from refold.training.progress import Bars, show_progress
from refold.training.run import RunFolder
from refold.training.schedule import build_optimizer, build_schedule

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["Trainer", "trained_tensors"]

_LOOK_EVERY = 20  # steps between two looks at the losses


@dataclass
class Trainer:
    """One run: ``model`` learns ``problem``; the rest are arguments of :func:`refold.training.fit`.

    What a checkpoint holds are the fields from ``epoch`` to ``seconds``, the trained tensors and the optimizer;
    ``saved`` counts the epochs in the last one.
    """

    model: nn.Module
    problem: Problem
    recipe: Recipe
    accelerator: Accelerator
    folder: RunFolder | None
    on_epoch: Callable[[dict[str, Any]], None] | None
    before_step: Callable[[int], None] | None = None

    epoch: int = 0
    attention: str = ""
    best: Best | None = None
    history: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0
    saved: int = 0

    def __post_init__(self) -> None:
        recipe = self.recipe
        self.steps = self.problem.steps
        groups = param_groups(self.model, recipe.lr, recipe.head_lr, recipe.weight_decay)
        self.parameters = [parameter for group in groups for parameter in group["params"]]
        self.optimizer = build_optimizer(groups)
        self.schedule = build_schedule(self.optimizer, recipe, self.steps)
        self.settings = recipe.to_json()

    # -- stopping and going on ------------------------------------------------------------------------------

    def resume(self, folder: RunFolder) -> None:
        """Take up the state of the folder's checkpoint, if it has one."""
        saved = folder.read_checkpoint()
        if saved is None:
            return
        check_same(saved.settings, self.settings, ignore=FREE_SETTINGS)
        check_same(saved.data, self.problem.facts)
        _load_tensors(self.model, saved.tensors)
        self.optimizer.load_state_dict(saved.optimizer)
        self.epoch, self.attention, self.best = saved.epoch, saved.attention, saved.best
        self.history, self.seconds, self.saved = saved.history, saved.seconds, saved.epoch

    def _save(self) -> None:
        if self.folder is not None and self.folder.main:
            Checkpoint(
                epoch=self.epoch,
                settings=self.settings,
                data=self.problem.facts,
                attention=self.attention,
                tensors=trained_tensors(self.model),
                optimizer=self.optimizer.state_dict(),
                best=self.best,
                history=self.history,
                seconds=self.seconds,
            ).write(self.folder.checkpoint_path)
        self.saved = self.epoch

    def restore_best(self) -> None:
        """Give the model the tensors of its best epoch."""
        if self.best is not None:
            _load_tensors(self.model, self.best.tensors)

    # -- epochs -------------------------------------------------------------------------------------------------

    def run(self, progress: bool | None) -> None:
        """Train the epochs that are left."""
        if self.epoch >= self.recipe.epochs:
            return
        self.model.train()
        if self.folder is not None:
            # Weights, their best copy and the optimizer's two averages, while the former file still exists.
            self.folder.require_space(8 * sum(p.nbytes for p in self.parameters))
            self.folder.start_log(self.history)
        if not self.attention:
            self.attention = self._choose_attention()
        several = self.accelerator.num_processes > 1
        wrapped = self.accelerator.prepare_model(self.model) if several else self.model
        with show_progress(
            progress if self.accelerator.is_main_process else False,
            epochs=self.recipe.epochs,
            steps=self.recipe.epochs * self.steps,
            done=self.epoch * self.steps,
        ) as bars:
            while self.epoch < self.recipe.epochs:
                start = time.perf_counter()
                self._train_epoch(wrapped, bars)
                self.epoch += 1
                self._validate()
                self.seconds += time.perf_counter() - start
                self._save()

    def _train_epoch(self, model: nn.Module, bars: Bars) -> None:
        start, first = time.perf_counter(), self.epoch * self.steps
        losses: list[Tensor] = []
        seed = _mix(self.recipe.seed, self.epoch, self.accelerator.process_index)
        torch.manual_seed(seed)
        batches = self.problem.batches(self.epoch, seed)
        bars.start_epoch(self.epoch + 1, self.steps)
        with attention_kernel(self.attention):
            for step, batch in enumerate(batches, start=first):
                self.schedule.step_update(step)
                if self.before_step is not None:
                    self.before_step(step)
                losses.append(self._step(model, batch))
                bars.step()
                if len(losses) % _LOOK_EVERY == 0:
                    self._require_finite(losses[-_LOOK_EVERY:], step + 1 - _LOOK_EVERY)
        self._require_finite(losses, first)
        mean = self.accelerator.reduce(torch.stack(losses).mean(), reduction="mean")
        rate = self.optimizer.param_groups[0]["lr"]
        self._log("train", {"loss": float(mean), "lr": rate}, first + self.steps, start)  # type: ignore[arg-type]

    def _step(self, model: nn.Module, batch: Any) -> Tensor:
        with self.problem.step():
            loss = self.problem.loss(model, batch)
            self.accelerator.backward(loss)
        if self.recipe.clip_grad is not None:
            torch.nn.utils.clip_grad_norm_(self.parameters, self.recipe.clip_grad)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def _validate(self) -> None:
        if self.epoch % self.recipe.validate_every and self.epoch < self.recipe.epochs:
            return
        start = time.perf_counter()
        row = self.problem.validate()
        if row is None:
            return
        loss = row.get("loss", 0.0)
        if not math.isfinite(loss):
            raise RefoldError(f"the validation loss of epoch {self.epoch} is {loss}", remedy=_CURE)
        self._log("val", row, self.epoch * self.steps, start)
        value = row[self.problem.select]
        worth = -value if lower_is_better(self.problem.select) else value
        if self.best is None or (worth, -loss) > (self.best.worth, -self.best.loss):
            self.best = Best(self.epoch, worth, loss, trained_tensors(self.model))

    def _choose_attention(self) -> str:
        if self.recipe.attention != "auto":
            return self.recipe.attention
        size = -(-min(self.recipe.batch_size, self.problem.images) // self.accelerator.num_processes)
        statistics = [(buffer, buffer.clone()) for buffer in self.model.buffers()]
        chosen = [choose_attention(lambda: self.problem.try_step(size), self.accelerator.device)]
        for buffer, before in statistics:  # those that train have seen noise
            buffer.copy_(before)
        if self.accelerator.num_processes > 1:
            from accelerate.utils import broadcast_object_list

            broadcast_object_list(chosen)  # each process has measured; all follow the first
        return chosen[0]

    def _require_finite(self, losses: list[Tensor], first: int) -> None:
        finite = torch.stack(losses).isfinite()
        if bool(finite.all()):
            return
        step = first + int(finite.logical_not().nonzero()[0])
        self.schedule.step_update(step)
        rate = max(group["lr"] for group in self.optimizer.param_groups)
        raise RefoldError(
            f"the loss is {float(losses[step - first])} at step {step + 1} "
            f"(epoch {self.epoch + 1}, learning rate {rate:.3g})",
            remedy=_CURE,
        )

    def _log(self, split: str, values: dict[str, float], step: int, start: float) -> None:
        epoch = -(-step // self.steps)
        seconds = time.perf_counter() - start
        row = {"epoch": epoch, "step": step, "split": split, **values, "seconds": seconds}
        self.history.append(row)
        if self.folder is not None:
            self.folder.log(row)
        if self.on_epoch is not None and self.accelerator.is_main_process:
            self.on_epoch(row)


_CURE = "Lower lr, or set clip_grad=1.0 or precision='fp32'; the last checkpoint is kept"


def trained_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Copies on the CPU of all that training changes: trainable parameters, and the buffers a model saves."""
    frozen = {name for name, parameter in model.named_parameters(remove_duplicate=False) if not parameter.requires_grad}
    return {
        name: tensor.detach().to("cpu", copy=True)
        for name, tensor in model.state_dict().items()
        if name not in frozen and isinstance(tensor, Tensor)
    }


@torch.no_grad()
def _load_tensors(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    present = model.state_dict(keep_vars=True)
    for name, tensor in tensors.items():
        present[name].copy_(tensor)


def _mix(seed: int, epoch: int, rank: int) -> int:
    """One number for torch's random state; no two (epoch, rank) of a run and hardly two of its seeds share one."""
    return (seed * 1_000_003 + epoch * 1_009 + rank) % 2**63
