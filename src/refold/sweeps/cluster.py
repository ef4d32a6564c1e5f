"""Ray, started quietly here or joined where it runs."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from refold.errors import DataError, MissingExtraError, RefoldError

__all__ = ["ray_started", "require_ray"]

#: What Ray reads: no reports to its makers, no tables and log files beside ours, the working directory and the GPUs as
#: they are, Ctrl-C that ends the command, as everywhere, and reports that are not for the scheduler.
_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
}
_SECONDS = 10.0  # to answer


def require_ray() -> Any:
    """The package ray.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        import ray
        import ray.data
        import ray.tune
    except ImportError as error:
        raise MissingExtraError.of("ray", "sweep") from error
    return ray


@contextmanager
def ray_started(address: str | None) -> Iterator[dict[str, float]]:
    """A Ray that runs inside the block, and what it has: ``{"CPU": 8.0, "GPU": 1.0, ...}``.

    Args:
        address: of a cluster that this machine belongs to, such as ``"auto"`` or ``"10.0.0.1:6379"``; None starts Ray
            on this machine, and ends it. A Ray that the process has started already is used as it is.

    Raises:
        MissingExtraError: ray is not installed.
        DataError: no address, or one of a Ray client, which would run Tune, and what watches it, on another machine.
        RefoldError: there is no cluster at the address.
    """
    if address is not None and address.startswith("ray://"):
        raise DataError(
            "is for clients outside of a cluster", where=address, remedy="Start this on one of its machines, with auto"
        )
    before = {name: os.environ.get(name) for name in _ENVIRONMENT}
    os.environ.update(_ENVIRONMENT)
    try:
        ray = require_ray()
        mine = not ray.is_initialized()
        if mine:
            _require_answer(address)
            options = {} if address else {"include_dashboard": False}
            try:
                ray.init(address or "local", log_to_driver=False, logging_level=logging.ERROR, **options)
            except (ConnectionError, ValueError, RuntimeError) as error:
                raise RefoldError(f"Ray cannot be reached ({error})", where=address or "ray") from error
        try:
            yield ray.cluster_resources()
        finally:
            if mine:
                ray.shutdown()
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _require_answer(address: str | None) -> None:
    """Complain of a host and port where nothing answers, on which Ray itself may spend twenty minutes.

    Raises:
        DataError: no host and port, where there should be.
        RefoldError: nothing answers.
    """
    if address is None or address in ("auto", "local"):
        return
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise DataError("is no address of a Ray cluster", where=address, remedy="Give HOST:PORT, or auto")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise RefoldError(f"Ray cannot be reached ({error})", where=address) from error
