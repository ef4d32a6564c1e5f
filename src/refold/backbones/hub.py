"""Access to the Hugging Face hub that fails within seconds, and says what to do without a network."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from refold.errors import BackboneError

__all__ = ["hub_access"]

_TIMEOUT = 5.0  # seconds to wait for the hub's first answer
_OFFLINE = (
    "Without a network: download the weights on another machine and pass the file with --weights FILE "
    "(weights=... in Python); or copy that machine's Hugging Face cache (~/.cache/huggingface) here and set "
    "HF_HUB_OFFLINE=1; or use a model that comes as a package, such as packaged/vit_small_focus"
)


@contextmanager
def hub_access(what: str) -> Iterator[None]:
    """Run a download by timm or open_clip so that any failure is one :class:`BackboneError` about ``what``.

    Left alone, huggingface_hub retries for most of a minute when the hub cannot be reached. So the hub is asked
    for one answer first; without one, its own offline mode is switched on for the duration of the block: what is
    in the local cache still loads, and what is not fails at once.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import GatedRepoError, RepositoryNotFoundError

    before = constants.HF_HUB_OFFLINE
    offline = before or not _reachable(constants.ENDPOINT)
    constants.HF_HUB_OFFLINE = offline
    try:
        yield
    except BackboneError:
        raise
    except (GatedRepoError, RepositoryNotFoundError) as error:
        raise BackboneError(
            "the hub has no such model, or it needs permission",
            where=what,
            remedy="Check the name, accept the model's terms on its page, and log in with: hf auth login",
        ) from error
    except Exception as error:  # what a download raises differs by library and version
        if offline and _has_os_error(error):
            reason = f"its weights are not in the local cache, and {constants.ENDPOINT} "
            reason += "is not to be asked (HF_HUB_OFFLINE is set)" if before else "cannot be reached"
            raise BackboneError(reason, where=what, remedy=_OFFLINE) from error
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise BackboneError(f"cannot be loaded ({first})", where=what, remedy=_OFFLINE) from error
    finally:
        constants.HF_HUB_OFFLINE = before


def _reachable(endpoint: str) -> bool:
    """Whether the hub answers at all, through the client's own proxies and certificates."""
    from huggingface_hub.utils import get_session

    try:
        get_session().head(endpoint, timeout=_TIMEOUT)
    except Exception:  # requests or httpx, by version of huggingface_hub: their errors share no base class
        return False
    return True


def _has_os_error(error: BaseException | None) -> bool:
    """Whether a missing file or a failed connection is behind the error (open_clip wraps it in RuntimeError)."""
    while error is not None:
        if isinstance(error, OSError):
            return True
        error = error.__cause__ or error.__context__
    return False
