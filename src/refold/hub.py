"""push_to_hub: an adapter file with a model card, in a repository of the Hugging Face hub.

``refold.load(model, "hf-hub:user/name")`` and ``refold.from_pretrained("hf-hub:user/name")`` read it back.
"""

from __future__ import annotations

import copy
import json
import tempfile
from pathlib import Path
from typing import Any

from torch import nn

from refold.certificate import certify
from refold.errors import MissingExtraError, StoreError
from refold.header import HUB_FILE, Header, hub_remedy, read_header
from refold.merging import unmerge
from refold.state import require_state
from refold.store import save

__all__ = ["model_card", "push_to_hub"]

_PIPELINES = {"classify": "image-classification", "multilabel": "image-classification"}


def push_to_hub(
    model: nn.Module,
    repo_id: str,
    *,
    name: str | None = None,
    private: bool | None = None,
    token: str | None = None,
    message: str = "Upload an adapter with refold",
) -> str:
    """Write one adapter and a generated model card to a hub repository, which is created if need be.

    The card says what ``refold.describe`` was told: backbone, classes, and of the further values ``datasets``,
    ``metrics`` and ``license``. From a merged model it also carries the exactness certificate, made on copies.

    Args:
        repo_id: ``"user/name"``.
        name: which adapter; None is the one in use or folded in.
        private: for a new repository; None is the account's default.
        token: None is the one of ``hf auth login``.
        message: of the commit.

    Returns:
        The repository's address.

    Raises:
        SiteError: nothing is attached, or no adapter has this name.
        StoreError: the adapter cannot be saved, or the hub refuses or cannot be reached.
        MissingExtraError: huggingface_hub is not installed.
    """
    state = require_state(model, "push")
    try:
        from huggingface_hub import create_repo, upload_folder
    except ImportError as error:
        raise MissingExtraError.of("huggingface_hub", "all") from error
    repo_id = repo_id.removeprefix("hf-hub:")
    with tempfile.TemporaryDirectory(prefix="refold-") as folder:
        path = save(model, Path(folder) / HUB_FILE, name=name)
        certificate = None
        if state.merged is not None and name in (None, state.merged):
            certificate = _certificate(model)
            path.with_name("certificate.json").write_text(json.dumps(certificate, indent=2))
        card = model_card(read_header(path), repo_id, size=path.stat().st_size, certificate=certificate)
        path.with_name("README.md").write_text(card, encoding="utf-8")
        try:
            url = create_repo(repo_id, private=private, token=token, exist_ok=True)
            upload_folder(repo_id=repo_id, folder_path=folder, commit_message=message, token=token)
        except Exception as error:  # the hub's client lets through errors of its transport, of any class
            raise StoreError(
                f"the upload failed ({type(error).__name__}: {error})",
                where=repo_id,
                remedy=hub_remedy(error, "keep the file with refold.save and upload it later"),
            ) from error
    return str(url)


def _certificate(model: nn.Module) -> dict[str, Any]:
    twin = copy.deepcopy(model)
    unmerge(twin)
    return certify(twin)


def model_card(header: Header, repo_id: str, *, size: int = 0, certificate: dict[str, Any] | None = None) -> str:
    """The README of a hub repository, with the metadata that the hub reads.

    Args:
        header: of the adapter file.
        size: bytes of the adapter file, 0 for no word about it.
        certificate: what :func:`refold.certificate.certify` returned, if the merge was certified.
    """
    from huggingface_hub import ModelCardData

    extra, method = header.extra, header.method
    metrics, datasets = extra.get("metrics"), extra.get("datasets")
    base = _base_model(header.backbone)
    data = ModelCardData(
        library_name="refold",
        base_model=base,
        base_model_relation="adapter" if base else None,
        license=str(extra["license"]) if extra.get("license") else None,
        datasets=[datasets] if isinstance(datasets, str) else list(map(str, datasets)) if datasets else None,
        metrics=_names(metrics) if isinstance(metrics, dict) else None,
        pipeline_tag=_PIPELINES.get(header.task),
        tags=["refold", "adapter", type(method).__name__.lower(), "vision"],
    )
    hyper = {key: value for key, value in method.to_json().items() if key != "name"}
    facts = {
        "Method": f"{type(method).__name__}: {method.summary} ({method.paper})",
        **{f"`{key}`": value for key, value in hyper.items()},
        "Backbone": header.backbone or f"not named; {header.architecture}",
        "Adapted layers": len(header.sites),
        "Merges": "yes, into the backbone's own weights" if method.mergeable else "no",
        "Task": header.task or "not described",
        "Classes": _classes(header),
        "Input": _input(header),
        **({"Sum of": _sum(extra["combined"])} if isinstance(extra.get("combined"), dict) else {}),
        **({"File": f"`{HUB_FILE}`, {size:,} bytes"} if size else {}),
        "Written by": f"refold {header.refold}",
    }
    parts = [
        f"---\n{data.to_yaml()}\n---",
        f"# {_line(repo_id.rpartition('/')[2])}",
        f"A {type(method).__name__} adapter and its head for refold, without the backbone's weights.",
        _table(("", ""), facts.items()),
        "## Load\n\n" + _usage(header, repo_id),
    ]
    if isinstance(metrics, dict) and metrics:
        parts.append("## Metrics\n\nAs described by the author.\n\n" + _table(("Metric", "Value"), _flat(metrics)))
    if certificate is not None:
        parts.append("## Certificate of exactness\n\n" + _certified(certificate))
    return "\n\n".join(parts) + "\n"


def _base_model(spec: str) -> str | None:
    """The backbone's own repository on the hub, where its spec names one."""
    if spec.startswith("hf-hub:"):
        return spec.removeprefix("hf-hub:")
    return spec if spec.startswith("timm/") and "." in spec else None


def _usage(header: Header, repo_id: str) -> str:
    if header.backbone:
        start = f'model = refold.from_pretrained("hf-hub:{repo_id}")'
    else:
        start = f'model = ...  # your {header.architecture}\nrefold.load(model, "hf-hub:{repo_id}")'
    end = "\nrefold.merge(model)  # the plain architecture, nothing added" if header.method.mergeable else ""
    return f"```python\nimport refold\n\n{start}{end}\n```"


def _classes(header: Header) -> str:
    if not header.classes:
        return "not described"
    shown = ", ".join(header.classes[:20])
    return f"{len(header.classes)}: {shown}" + (", ..." if len(header.classes) > 20 else "")


def _input(header: Header) -> str:
    p = header.preprocessing
    if p is None:
        return "not described"
    return f"{p.size[0]} x {p.size[1]}, {p.channels} channels, {p.interpolation}, {p.crop}, mean {p.mean}, std {p.std}"


def _sum(weights: dict[str, Any]) -> str:
    return " + ".join(f"{weight} x {name}" for name, weight in weights.items())


def _certified(certificate: dict[str, Any]) -> str:
    rows = [
        (dtype, f"{row['rel_l2']:.1e}", f"{row['limit']:.1e}", f"{row['max_abs']:.1e}")
        for dtype, row in certificate["dtypes"].items()
    ]
    table = _table(("Precision", "Relative L2", "Limit", "Largest difference"), rows)
    checks = [
        f"{certificate['folded_tensors']} tensors of {certificate['folded_layers']} layers folded",
        f"{certificate['parameters']['merged']:,} parameters merged, {certificate['parameters']['backbone']:,} in the "
        "backbone with this head",
        f"{certificate['hooks_left']} hooks and {certificate['extra_modules']} modules left",
    ]
    verdict = "holds" if certificate["holds"] else "FAILS"
    listed = "\n".join(f"- {check}" for check in checks)
    inputs = certificate["probe"]["inputs"]
    return f"Merged against unmerged outputs on {inputs} inputs: **{verdict}**.\n\n{table}\n\n{listed}"


def _names(metrics: dict[str, Any]) -> list[str]:
    """What was measured, whatever it is grouped by."""
    found = [name for key, v in metrics.items() for name in (_names(v) if isinstance(v, dict) else [str(key)])]
    return list(dict.fromkeys(found))


def _flat(metrics: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = []
    for key, value in metrics.items():
        rows += _flat(value, f"{prefix}{key} ") if isinstance(value, dict) else [(f"{prefix}{key}", value)]
    return rows


def _table(header: tuple[str, ...], rows: Any) -> str:
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join("| " + " | ".join(_line(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


def _line(value: object) -> str:
    """One line of text, whatever a class name or a description holds."""
    return " ".join(str(value).split())
