"""What an adapter file says about itself, read without trusting it.

Nothing is unpickled; header size, offsets, shapes and hyper-parameters are checked before anything of their size
is allocated.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from refold.errors import MissingExtraError, RefoldError, StoreError
from refold.methods import Method, method_from_json
from refold.preprocessing import Preprocessing

__all__ = ["FORMAT", "HUB_FILE", "Header", "fetch", "hub_remedy", "read_header", "safetensors_metadata"]

FORMAT = 1
#: The adapter's file in a hub repository.
HUB_FILE = "adapter.safetensors"
_MAX_HEADER = 16 * 2**20
_MAX_JSON = 4 * 2**20
#: What a stranger's file may ask ``from_pretrained`` to build: pixels a side, outputs of the head.
_MAX_SIZE = 4096
_MAX_OUTPUTS = 2**20


@dataclass(frozen=True)
class Header:
    """What an adapter file says about itself.

    Attributes:
        name: the adapter's name.
        method: its hyper-parameters.
        backbone: spec the backbone can be loaded from, "" if unknown.
        architecture: class of the backbone.
        fingerprint: see :mod:`refold.fingerprint`.
        sites: (layer path, slot, shift) of every adapter.
        head: module paths of the head.
        classes, preprocessing, task, extra: what ``refold.describe`` was told.
        refold: version that wrote the file.
        part: path of the backbone in the dense model that the file holds the rest of; "" for a backbone alone.
    """

    name: str
    method: Method
    backbone: str
    architecture: str
    fingerprint: dict[str, Any]
    sites: tuple[tuple[str, str, str], ...]
    head: tuple[str, ...]
    classes: tuple[str, ...] | None = None
    preprocessing: Preprocessing | None = None
    task: str = ""
    allow_new_bias: bool = False
    refold: str = ""
    extra: dict[str, Any] = field(default_factory=dict)
    part: str = ""


def fetch(source: str | Path) -> Path:
    """A local file as it is; the adapter of ``hf-hub:user/repo`` (``@revision`` may follow) from the hub's cache."""
    text = str(source)
    if not text.startswith("hf-hub:"):
        return Path(source)
    try:
        from huggingface_hub import hf_hub_download
    except ImportError as error:
        raise MissingExtraError.of("huggingface_hub", "all") from error
    repo, _, revision = text.removeprefix("hf-hub:").partition("@")
    try:
        return Path(hf_hub_download(repo, HUB_FILE, revision=revision or None))
    except Exception as error:  # the hub's client lets through errors of its transport, of any class
        raise StoreError(
            f"cannot be downloaded ({type(error).__name__})",
            where=text,
            remedy=hub_remedy(error, f"download {HUB_FILE} elsewhere and pass its path"),
        ) from error


def hub_remedy(error: Exception, otherwise: str) -> str:
    """What to do about a failed call to the hub."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403) or type(error).__name__ == "LocalTokenNotFoundError":
        return f"Log in with `hf auth login` as someone who may do this, or {otherwise}"
    return f"Check the name and the network, or {otherwise}"


def read_header(source: str | Path) -> Header:
    """What an adapter file says about itself, without touching its tensors.

    Raises:
        StoreError: the file is missing, no refold adapter, truncated, malformed, or from a newer format.
    """
    path = fetch(source)
    where = str(source)
    metadata = safetensors_metadata(path, where)
    raw = metadata.get("refold")
    if not isinstance(raw, str):
        raise StoreError(
            "a safetensors file, but not a refold adapter", where=where, remedy="Write it with refold.save"
        )
    if len(raw) > _MAX_JSON:
        raise StoreError("the header is implausibly large", where=where)
    try:
        data = json.loads(raw)
        found = data["format"]
        if type(found) is not int or not 1 <= found <= FORMAT:
            raise StoreError(
                f"written in format {found}, this refold reads up to {FORMAT}",
                where=where,
                remedy="Upgrade refold",
            )
        header = Header(
            name=str(data["name"]),
            method=method_from_json(data["method"]),
            backbone=str(data["backbone"]),
            architecture=str(data["architecture"]),
            fingerprint=dict(data["fingerprint"]),
            sites=tuple((str(p), str(s), str(t)) for p, s, t in data["sites"]),
            head=tuple(map(str, data["head"])),
            classes=None if data["classes"] is None else tuple(map(str, data["classes"])),
            preprocessing=None if data["preprocessing"] is None else Preprocessing.from_json(data["preprocessing"]),
            task=str(data["task"]),
            allow_new_bias=bool(data["allow_new_bias"]),
            refold=str(data["refold"]),
            extra=dict(data["extra"]),
            part=str(data.get("part", "")),
        )
    except StoreError:
        raise
    except (RefoldError, KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError) as error:
        raise StoreError(f"the header is malformed ({type(error).__name__}: {error})", where=where) from error
    outputs = header.extra.get("outputs", 1)
    if not isinstance(outputs, int) or not 1 <= outputs <= _MAX_OUTPUTS:
        raise StoreError(f"asks for {outputs!r} outputs", where=where)
    if header.preprocessing is not None and max(header.preprocessing.size) > _MAX_SIZE:
        raise StoreError(f"asks for images of {header.preprocessing.size} pixels", where=where)
    return header


def safetensors_metadata(path: Path, where: str) -> dict[str, Any]:
    """The metadata, after checking that header and tensors lie inside the file."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else -1
            if length < 2 or length > min(_MAX_HEADER, size - 8):
                raise StoreError(
                    "not a safetensors file, or truncated", where=where, remedy="Copy or download it again"
                )
            header = json.loads(file.read(length))
        if not isinstance(header, dict):
            raise ValueError("the header is no object")
        metadata = header.pop("__metadata__", {})
        end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
        if end != size - 8 - length:
            raise StoreError(
                f"truncated: its header promises {end + 8 + length:,} bytes, the file has {size:,}",
                where=where,
                remedy="Copy or download it again",
            )
        if not isinstance(metadata, dict):
            raise ValueError("the metadata is no object")
        with safe_open(path, framework="pt"):  # validates dtypes, shapes and offsets against each other
            return metadata
    except OSError as error:
        raise StoreError(f"cannot be read ({error.strerror or error})", where=where) from error
    except (ValueError, KeyError, TypeError, IndexError, RecursionError, SafetensorError) as error:
        raise StoreError(f"not a valid safetensors file ({error})", where=where) from error
