"""The training loop: steps, epochs, validation, checkpoints.

Nothing in a step waits for the device: losses stay there and are looked at every few steps and at the end of
the epoch. All randomness is a function of (seed, epoch, process), and checkpoints within an epoch hold how far it came,
so a run that goes on from a checkpoint computes what the uninterrupted run computes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from refold.attachment import param_groups
from refold.errors import DataError, RefoldError
from refold.training.attention import attention_kernel, choose_attention
from refold.training.checkpoint import Best, Checkpoint, Midway, check_same
from refold.training.config import FREE_SETTINGS
from refold.training.metrics import lower_is_better
from refold.training.problem import Problem
from refold.training.progress import Bars, show_progress
from refold.training.recipe import Recipe
from refold.training.run import RunFolder
from refold.training.schedule import build_optimizer, build_schedule
from refold.training.sharding import sharded

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["Paused", "Trainer", "trained_tensors"]

_LOOK_EVERY = 20  # steps between two looks at the losses


class Paused(Exception):
    """A run has come as far as it was to go for now; its checkpoint is written."""


@dataclass
class Trainer:
    """One run: ``model`` learns ``problem``; the rest are arguments of :func:`refold.training.fit`.

    What a checkpoint holds are the fields from ``epoch`` to ``midway``, the trained tensors and the optimizer;
    ``saved`` counts the steps in the last one.
    """

    model: nn.Module
    problem: Problem
    recipe: Recipe
    accelerator: Accelerator
    folder: RunFolder | None
    on_epoch: Callable[[dict[str, Any]], None] | None
    before_step: Callable[[int], None] | None = None
    until: int | None = None

    epoch: int = 0
    attention: str = ""
    best: Best | None = None
    history: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0
    midway: Midway | None = None
    saved: int = 0

    def __post_init__(self) -> None:
        recipe = self.recipe
        self.steps = self.problem.steps // recipe.accumulate
        groups = param_groups(self.model, recipe.lr, recipe.head_lr, recipe.weight_decay)
        self.parameters = [parameter for group in groups for parameter in group["params"]]
        self.optimizer = build_optimizer(groups, recipe.optimizer)
        self.schedule = build_schedule(self.optimizer, recipe, self.steps)
        self.settings = recipe.to_json()

    # -- stopping and going on ------------------------------------------------------------------------------

    def resume(self, folder: RunFolder) -> None:
        """Take up the state of the folder's checkpoint, if it has one."""
        from accelerate.utils import broadcast_object_list

        read = [folder.read_checkpoint() if folder.main else None]
        broadcast_object_list(read)  # other hosts need not see the folder
        saved = read[0]
        if saved is None:
            return
        before = type(self.recipe).from_json(saved.settings)  # with the defaults of settings that came later
        check_same(before.to_json(), self.settings, ignore=FREE_SETTINGS)
        check_same(saved.data, self.problem.facts)
        _load_tensors(self.model, saved.tensors)
        self.optimizer.load_state_dict(saved.optimizer)
        self.epoch, self.attention, self.best = saved.epoch, saved.attention, saved.best
        self.history, self.seconds, self.saved = saved.history, saved.seconds, saved.epoch * self.steps
        if saved.midway is not None:
            if len(saved.midway) != self.accelerator.num_processes:
                raise DataError(
                    f"the epoch was begun by {len(saved.midway)} processes and cannot be finished by "
                    f"{self.accelerator.num_processes}",
                    where=str(folder.checkpoint_path),
                    remedy="Start as many",
                )
            self.midway = saved.midway[self.accelerator.process_index]
            self.saved += len(self.midway.losses)

    def _save(self, midway: Midway | None = None, seconds: float = 0.0) -> None:
        """Write a checkpoint, of the end of an epoch or, ``seconds`` into the next one, ``midway``."""
        from accelerate.utils import gather_object

        everywhere = None if midway is None else gather_object([midway])
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
                seconds=self.seconds + seconds,
                midway=everywhere,
            ).write(self.folder.checkpoint_path)
        self.saved = self.epoch * self.steps + (0 if midway is None else len(midway.losses))

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
            # Weights, their best copy and the optimizer's averages, at most two, while the former file still exists.
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
            done=self.saved,
        ) as bars:
            while self.epoch < self.recipe.epochs:
                start = time.perf_counter()
                with sharded(self.model, self.accelerator):
                    self._train_epoch(wrapped, bars)
                if several:
                    self._share_buffers()
                self.epoch += 1
                self._validate()
                self.seconds += time.perf_counter() - start
                self._save()
                if self.epoch == self.until:
                    raise Paused

    def _train_epoch(self, model: nn.Module, bars: Bars) -> None:
        start, first = time.perf_counter(), self.epoch * self.steps
        parts, every = self.recipe.accumulate, self.recipe.checkpoint_every
        seed = _mix(self.recipe.seed, self.epoch, self.accelerator.process_index)
        losses, state = self._begin_epoch(seed)
        batches = self.problem.batches(self.epoch, seed, len(losses) * parts, state)
        bars.start_epoch(self.epoch + 1, self.steps, len(losses))
        with attention_kernel(self.attention):
            for step, batch in enumerate(_full_groups(batches, parts), start=first + len(losses)):
                self.schedule.step_update(step)
                if self.before_step is not None:
                    self.before_step(step)
                losses.append(self._step(model, batch))
                bars.step()
                if len(losses) % _LOOK_EVERY == 0:
                    self._require_finite(losses[-_LOOK_EVERY:], step + 1 - _LOOK_EVERY)
                if every is not None and (step + 1) % every == 0 and len(losses) < self.steps:
                    self._require_finite(losses[-_LOOK_EVERY:], step + 1 - len(losses[-_LOOK_EVERY:]))
                    self._save(self._now(losses), time.perf_counter() - start)
        self._require_finite(losses, first)
        mean = self.accelerator.reduce(torch.stack(losses).mean(), reduction="mean")
        rate = self.optimizer.param_groups[0]["lr"]
        self._log("train", {"loss": float(mean), "lr": rate}, first + self.steps, start)  # type: ignore[arg-type]

    @torch.no_grad()
    def _share_buffers(self) -> None:
        """Give every process the first one's running statistics.

        DistributedDataParallel does so before each step, which leaves those of the last one different: each process
        would judge a model of its own, and none but the first the one that is saved.
        """
        for buffer in self.model.buffers():
            whole = buffer.contiguous()
            torch.distributed.broadcast(whole, src=0)
            buffer.copy_(whole)

    def _begin_epoch(self, seed: int) -> tuple[list[Tensor], dict[str, Any] | None]:
        """The losses that the epoch has already and the problem's state, with torch's random states as they belong."""
        midway, self.midway = self.midway, None
        if midway is None:
            torch.manual_seed(seed)
            return [], None
        torch.set_rng_state(midway.random[0])
        if self.accelerator.device.type == "cuda":
            torch.cuda.set_rng_state(midway.random[1], self.accelerator.device)
        return list(midway.losses.to(self.accelerator.device)), midway.problem

    def _now(self, losses: list[Tensor]) -> Midway:
        device = self.accelerator.device
        random = [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]
        return Midway(torch.stack(losses).cpu(), random, self.problem.state())

    def _step(self, model: nn.Module, batches: list[Any]) -> Tensor:
        """One step of the optimizer on the mean of the batches' losses, which it returns."""
        losses = []
        for batch in batches:
            # Several processes average the sum so far with each: what is equal everywhere stays as it is. Exchanging
            # gradients once, with the last (no_sync), is not for a graph that is known to be static.
            with self.problem.step():
                loss = self.problem.loss(model, batch) / len(batches)
                self.accelerator.backward(loss)
            losses.append(loss.detach())
        if self.recipe.clip_grad is not None:
            torch.nn.utils.clip_grad_norm_(self.parameters, self.recipe.clip_grad)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return torch.stack(losses).sum()

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
        batch = self.recipe.batch_size // self.recipe.accumulate
        size = -(-min(batch, self.problem.images) // self.accelerator.num_processes)
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


def _full_groups(batches: Iterable[Any], size: int) -> Iterator[list[Any]]:
    iterator = iter(batches)
    while len(group := list(islice(iterator, size))) == size:
        yield group


@torch.no_grad()
def _load_tensors(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    present = model.state_dict(keep_vars=True)
    for name, tensor in tensors.items():
        present[name].copy_(tensor)


def _mix(seed: int, epoch: int, rank: int) -> int:
    """One number for torch's random state; no two (epoch, rank) of a run and hardly two of its seeds share one."""
    return (seed * 1_000_003 + epoch * 1_009 + rank) % 2**63
