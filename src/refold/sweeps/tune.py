"""Many pieces of work at once, on Ray Tune: this machine's cores and GPUs, or a cluster's.

Ray's own state is thrown away: what was done is in the files that the work writes, and a sweep that starts again reads
those. So a driver may die as well as a worker. On a cluster data and output must be in folders that all machines share.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from contextlib import chdir
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from refold.errors import DataError, RefoldError
from refold.protocols.trial import Job, Standing
from refold.sweeps.cluster import ray_started

__all__ = ["RayEngine", "Report"]

T = TypeVar("T")
Report = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class RayEngine:
    """Runs work in processes of Ray Tune.

    Attributes:
        address: of a cluster; None is this machine.
        cpus: cores of one trial; its threads are no more than these.
        gpus: GPUs of one trial, also a part of one, such as 0.5; None is one where there is any.
        retries: how often a trial whose process dies starts again, from its last checkpoint.
    """

    address: str | None = None
    cpus: int = 1
    gpus: float | None = None
    retries: int = 3

    def __post_init__(self) -> None:
        if self.cpus < 1:
            raise DataError(f"must be 1 or more, not {self.cpus}", where="cpus")
        if self.gpus is not None and not 0 <= self.gpus < float("inf"):
            raise DataError(f"must be 0 or more, not {self.gpus}", where="gpus")
        if self.retries < 0:
            raise DataError(f"must be 0 or more, not {self.retries}", where="retries")

    def run(
        self,
        work: Callable[[T, Report], None],
        items: Sequence[T],
        folder: Path,
        *,
        halving: tuple[int, int, int] | None = None,
        on_report: Callable[[int, dict[str, Any]], None] | None = None,
        on_end: Callable[[int], None] | None = None,
    ) -> dict[int, str]:
        """Do ``work(item, report)`` for every item, each in a process.

        Args:
            work: a function of a module; what it reports comes to ``on_report``.
            items: plain data, or whatever pickles.
            folder: whose subfolder ``ray`` Ray may use while it runs.
            halving: epochs of a whole run, of the first rung, and the reduction: ASHA, of work that reports ``epochs``
                and ``worth``.
            on_report: called with the item's number and each of its reports.
            on_end: called with the item's number when it is done, or stopped by ASHA.

        Returns:
            item number -> why it failed: an error of refold, or a process that died once too often.

        Raises:
            DataError: more cores or GPUs a trial than there are.
            MissingExtraError, RefoldError: Ray is not installed, or not reached.
        """
        with ray_started(self.address) as resources:
            from ray import tune
            from ray.tune.schedulers import ASHAScheduler

            gpus = float(resources.get("GPU", 0) > 0) if self.gpus is None else self.gpus
            for name, wanted in (("CPU", self.cpus), ("GPU", gpus)):
                if wanted > resources.get(name, 0):
                    raise DataError(
                        f"a trial wants {wanted:g} {name}s and Ray has {resources.get(name, 0):g}",
                        where=f"{name}s".lower(),
                    )

            reported, ended = _Here(on_report), _Here(on_end)

            class Watch(tune.Callback):
                def on_trial_result(self, iteration: int, trials: Any, trial: Any, result: Any, **info: Any) -> None:
                    reported(trial.config["item"], result)

                def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
                    if "refused" not in trial.last_result:
                        ended(trial.config["item"])

            scheduler = None
            if halving is not None:
                epochs, grace, reduction = halving
                # No rung at the last epoch: a run that came so far is to be finished.
                scheduler = ASHAScheduler(
                    time_attr="epochs", metric="worth", mode="max", max_t=epochs - 1, grace_period=grace,
                    reduction_factor=reduction, stop_last_trials=False,
                )  # fmt: skip
            parts = {"work": work, "items": list(items), "folder": str(Path.cwd()), "threads": self.cpus}
            trainable = tune.with_resources(tune.with_parameters(_trainable, **parts), {"cpu": self.cpus, "gpu": gpus})
            storage = folder.absolute() / "ray"
            shutil.rmtree(storage, ignore_errors=True)
            tuner = tune.Tuner(
                trainable,
                param_space={"item": tune.grid_search(list(range(len(items))))},
                tune_config=tune.TuneConfig(scheduler=scheduler, reuse_actors=True),
                run_config=tune.RunConfig(
                    name="trials", storage_path=str(storage), verbose=0, callbacks=[Watch()],
                    failure_config=tune.FailureConfig(max_failures=self.retries),
                ),
            )  # fmt: skip
            found = {(result.config or {})["item"]: result for result in tuner.fit()}
            shutil.rmtree(storage, ignore_errors=True)
        failures = {}
        for item, result in found.items():
            if result.error is not None:
                failures[item] = _last_line(result.error)
            elif (refused := (result.metrics or {}).get("refused")) is not None:
                failures[item] = refused
        return failures

    def records(self, jobs: Sequence[Job], folder: Path, on_job: Callable[[Standing], None] | None = None) -> None:
        """Make the records of a protocol's trainings that are not there yet.

        Args:
            jobs, folder, on_job: see :class:`refold.protocols.trial.Engine`.

        Raises:
            RefoldError: the first that failed, after all others were made.
        """
        missing = [job for job in jobs if not job.path.is_file()]
        if not missing:
            return
        tell = on_job or (lambda standing: None)
        for job in missing:
            tell(Standing(job, "waiting"))

        def on_report(item: int, report: dict[str, Any]) -> None:
            if "epoch" in report:
                tell(Standing(missing[item], "running", report["epoch"]))

        def on_end(item: int) -> None:
            tell(Standing(missing[item], "finished", missing[item].config.epochs))

        failures = self.run(_make, missing, folder, on_report=on_report, on_end=on_end)
        for item in failures:
            tell(Standing(missing[item], "failed"))
        for item, reason in sorted(failures.items()):
            raise RefoldError(reason, where=str(missing[item].path))


class _Here:
    """Calls a function of this process. Ray pickles what watches a sweep, to restore it, which nothing here does; a
    function that writes to a terminal does not pickle."""

    def __init__(self, function: Callable[..., None] | None = None) -> None:
        self.function = function

    def __call__(self, *arguments: Any) -> None:
        if self.function is not None:
            self.function(*arguments)

    def __reduce__(self) -> tuple[type[_Here], tuple[()]]:
        return _Here, ()


def _trainable(
    config: dict[str, Any], work: Callable[[Any, Report], None], items: Sequence[Any], folder: str, threads: int
) -> None:
    import torch
    from ray import tune

    torch.set_num_threads(threads)
    with chdir(folder if Path(folder).is_dir() else "."):
        try:
            work(items[config["item"]], tune.report)
        except RefoldError as error:  # would come again at every retry
            tune.report({"refused": str(error)})


def _make(job: Job, report: Report) -> None:
    def tell(record: dict[str, Any]) -> None:
        if record["split"] == "train":
            report({"epoch": record["epoch"]})

    job.make(on_epoch=tell)


def _last_line(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__
