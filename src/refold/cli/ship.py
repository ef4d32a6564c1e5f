"""``refold merge``, ``export`` and ``explain``: from an adapter to a file with nothing added."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated, cast

import typer

import refold
from refold.attachment import attached_part
from refold.cli.console import console
from refold.cli.options import Adapter, Force, Weights, parse_method
from refold.errors import MergeError, RefoldError
from refold.state import require_state

__all__ = ["explain", "export", "merge"]


class Format(StrEnum):
    ONNX = "onnx"
    PROGRAM = "program"
    WEIGHTS = "weights"


def merge(
    adapter: Adapter,
    output: Annotated[Path, typer.Option("--output", "-o", help="File for the merged weights (.safetensors).")] = Path(
        "merged.safetensors"
    ),
    weights: Weights = None,
    force: Force = False,
) -> None:
    """Fold an adapter into its backbone and write plain weights, with a certificate of exactness.

    The file loads strictly with timm.create_model(...).load_state_dict, without refold; of segmentation and detection
    it holds the whole model, with its backbone's weights under the name that is printed. An adapted text tower becomes
    a fixed head. The certificate is printed and written beside it.

    Example: refold merge runs/cells --output cells.safetensors
    """
    from refold.backbones import fold_text
    from refold.certificate import certify
    from refold.export import export_weights
    from refold.report import tables
    from refold.training import resolve

    ready = resolve(adapter, weights=weights, force=force)
    model, part = ready.model, attached_part(ready.model)
    certificate = certify(ready.backbone)
    if not certificate["holds"]:
        console.print(tables.certificate_table(certificate))
        raise MergeError("the merge is not exact; nothing was written", where=adapter)
    refold.merge(ready.backbone)
    model = fold_text(model)
    result = export_weights(model, output)
    record = json.dumps(certificate, indent=2)
    beside = output.with_suffix(".certificate.json")
    beside.write_text(record)
    if Path(adapter).is_dir():
        (Path(adapter) / "certificate.json").write_text(record)
        refold_report(Path(adapter))
    console.print(tables.certificate_table(certificate))
    console.print(f"Merged weights: {result.path} ({result.bytes:,} bytes)\nCertificate: {beside}")
    if part:
        console.print(f"The backbone's weights are those whose names begin with {part}.", highlight=False)


def refold_report(folder: Path) -> None:
    """Bring the run's report up to date."""
    from refold.report import write_report

    console.print(f"Report: {write_report(folder)}")


def export(
    adapter: Adapter,
    output: Annotated[Path, typer.Option("--output", "-o", help="File to write.", show_default=False)],
    format: Annotated[Format, typer.Option(help="ONNX graph, torch.export program, or plain weights.")] = Format.ONNX,
    preprocessing: Annotated[
        bool,
        typer.Option(
            "--preprocessing", help="Bake scaling and normalisation in (not for weights); the input is uint8."
        ),
    ] = False,
    size: Annotated[
        tuple[int, int] | None,
        typer.Option(
            help="Of a detector in ONNX: height and width of the images it is for, for example 480 640; the side it "
            "was trained at if not given.",
            show_default=False,
        ),
    ] = None,
    weights: Weights = None,
    force: Force = False,
) -> None:
    """Write an adapted model for deployment, checked; merged where its method merges, else with the adapters inside.

    A detector in ONNX takes one image of one size, (3, H, W) in [0, 1], and gives boxes, labels, scores and masks.

    Example: refold export runs/cells --output cells.onnx --preprocessing
    """
    from refold.backbones import fold_text
    from refold.detection import Detector
    from refold.export import export_detector, export_onnx, export_program, export_weights
    from refold.training import resolve

    ready = resolve(adapter, weights=weights, force=force)
    model, prepared = ready.model, ready.preprocessing
    detects = ready.kind in ("detect", "instance")
    if detects and format is Format.PROGRAM:
        raise RefoldError(
            "a detector takes a list of images and returns lists of objects, which --format program has no form for",
            where=adapter,
            remedy="Use --format onnx or --format weights",
        )
    if size is not None and not (detects and format is Format.ONNX):
        raise RefoldError("is for detectors in ONNX only", where="--size", remedy="Leave it out")
    if require_state(ready.backbone, "export").record().method.mergeable:
        refold.merge(ready.backbone)
        model = fold_text(model)
    elif format is Format.WEIGHTS:
        raise MergeError(
            "its adapters stay beside the backbone, whose plain weights would leave them out",
            where=adapter,
            remedy="Use --format onnx" if detects else "Use --format onnx or --format program",
        )
    if detects and format is Format.ONNX:
        detector = cast(Detector, model)
        result = export_detector(detector, output, preprocessing=prepared, size=size, with_preprocessing=preprocessing)
    elif format is Format.ONNX:
        result = export_onnx(model, output, preprocessing=prepared, with_preprocessing=preprocessing)
    elif format is Format.PROGRAM:
        result = export_program(model, output, preprocessing=prepared, with_preprocessing=preprocessing)
    else:
        result = export_weights(model, output)
    console.print(f"{result.path}: {result.bytes:,} bytes", highlight=False)
    if format is not Format.WEIGHTS:
        differs = f"{result.max_abs:.2e}, relative {result.max_rel:.2e}"
        console.print(f"largest difference from the model in PyTorch: {differs}")


def explain(
    source: Annotated[
        str,
        typer.Argument(help="A run folder or adapter file, or a model spec together with --method.", metavar="SOURCE"),
    ],
    method: Annotated[str | None, typer.Option(help="What to attach, for example 'RepAdapter(rank=16)'.")] = None,
    weights: Weights = None,
    force: Force = False,
) -> None:
    """Show where a method's adapters go, what they cost, and whether and where each folds.

    Example: refold explain timm/convnext_tiny --method RepAdapter
    """
    from refold import backbones
    from refold.report import tables
    from refold.training import resolve

    if method is None:
        model = resolve(source, weights=weights, force=force).backbone
    else:
        chosen = parse_method(method)
        model = backbones.load(source, num_classes=2, weights=weights, pretrained=weights is not None).model
        refold.attach(model, chosen)
    found = refold.explain(model)
    console.print(tables.explain_table(found.rows))
    console.print(
        f"{found.method}: {found.adapter_parameters:,} parameters beside the head, {found.trainable:,} in all, "
        f"of {found.total:,} ({100 * found.trainable / found.total:.2f} %)",
        highlight=False,
    )
