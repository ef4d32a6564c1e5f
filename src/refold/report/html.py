"""The report of a run: one HTML file that holds all it shows, opens without a network and runs no script."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from refold.errors import RefoldError
from refold.report import formats, grids
from refold.report.grids import Grid
from refold.report.run import Run, Thumbnail, read_run

if TYPE_CHECKING:
    import numpy as np
    from markupsafe import Markup

__all__ = ["render", "write_report"]

MAX_THUMBNAILS = 24  # of right and of wrong predictions each
THUMBNAIL_SIDE = 192  # pixels
MAX_CONFUSION = 30  # classes beyond which the confusion matrix is a picture and a list of mistakes only
# the metrics worth a tile, in this order
LEADING = ("accuracy", "map", "mae", "rmse", "auroc", "f1", "r2", "miou", "pixel_accuracy", "ap", "ap50")
TASKS = {
    "classify": "classification",
    "multilabel": "multi-label",
    "regress": "regression",
    "segment": "semantic segmentation",
    "detect": "object detection",
    "instance": "instance segmentation",
}
OVERLAYS_WIDTH = 1600  # pixels


def write_report(run_dir: str | Path) -> Path:
    """Write ``report.html`` into a run folder and return its path.

    The page shows what the folder holds; files that are not there are left out. It is rewritten as a whole,
    so call it again after merging or measuring.

    Raises:
        DataError: the folder is no run, or one of its files is broken.
        RefoldError: the page cannot be written; a former one is still there.
    """
    run = read_run(run_dir)
    page, target = render(run), run.path / "report.html"
    partial = run.path / ".report.html.part"
    try:
        partial.write_text(page, encoding="utf-8")
        partial.replace(target)
    except OSError as error:
        raise RefoldError(f"cannot be written ({error})", where=str(target)) from error
    finally:
        partial.unlink(missing_ok=True)
    return target


def render(run: Run) -> str:
    """The page of a run as text."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("refold.report", "templates"),
        autoescape=True,  # class names, paths and settings are the user's text
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html").render(
        **_head(run),
        **_training(run),
        **_results(run),
        **_examples(run),
        **_cost(run),
        **_configuration(run),
        certificate=_certificate(run),
        version=version("refold"),
        written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    )


# --- head -----------------------------------------------------------------------------------------------


def _head(run: Run) -> dict[str, Any]:
    settings, summary = run.settings, run.summary
    method = settings.get("method")
    name = method.get("name") if isinstance(method, Mapping) else method
    title = " on ".join(str(part) for part in (name, settings.get("model")) if part) or run.path.resolve().name
    facts = []
    if data := settings.get("data"):
        facts.append(f"Data: {PurePath(str(data)).name}")
    if decoder := summary.get("decoder"):
        facts.append(f"Decoder: {decoder}" if summary.get("task") == "segment" else f"Detector: {decoder}")
    if classes := summary.get("classes"):
        facts.append(f"{len(classes)} classes" if len(classes) > 1 else "1 class")
    if images := summary.get("images"):
        counts = (f"{formats.count(n)} {grids.SPLITS.get(split, split)}" for split, n in images.items() if n)
        facts.append(" / ".join(counts) + " images")
    if isinstance(method, Mapping) and (details := {k: v for k, v in method.items() if k != "name" and v is not None}):
        facts.append(formats.plain(details))
    if (seed := settings.get("seed")) is not None:
        facts.append(f"seed {seed}")
    notes = []
    if not summary:
        notes.append("This run is not finished: the page shows what it has written so far.")
    if run.unreadable:
        lines = "one line" if run.unreadable == 1 else f"{run.unreadable} lines"
        notes.append(f"{lines} of metrics.jsonl could not be read, as when a run is killed while writing.".capitalize())
    if skipped := summary.get("skipped"):
        notes.append(f"Images left out because they cannot be read: {len(skipped)}; listed below.")
    return {
        "title": title,
        "skipped": _skipped_grid(skipped) if skipped else None,
        "task": TASKS.get(summary.get("task", ""), ""),
        "subtitle": " · ".join(facts),
        "notes": notes,
        "tiles": _tiles(run),
    }


def _skipped_grid(skipped: Sequence[Mapping[str, Any]]) -> Grid:
    rows = tuple((str(item.get("path", "")), str(item.get("reason", ""))) for item in skipped)
    return Grid("Images left out", ("file", "reason"), rows, text_columns=2)


def _tiles(run: Run) -> list[dict[str, str]]:
    summary, tiles = run.summary, []

    def add(label: str, value: str, detail: str = "", kind: str = "") -> None:
        if value != formats.NONE:
            tiles.append({"label": label, "value": value, "detail": detail, "kind": kind})

    split, metrics = _final_metrics(summary)
    for name in [name for name in LEADING if name in metrics][:3]:
        add(
            f"{grids.SPLITS.get(split, split)} {grids.metric_title(name)}",
            formats.metric(name, metrics[name]),
        )
    trainable = summary.get("trainable_parameters")
    share = f"{_share(summary)} of the model" if _share(summary) else ""
    add("trainable parameters", formats.count(trainable), share)
    add("adapter file", formats.size(summary.get("file_bytes")))
    epochs = run.settings.get("epochs")
    add("training time", formats.duration(summary.get("seconds")), f"{epochs} epochs" if epochs else "")
    add("peak memory", formats.size(summary.get("peak_memory")))
    if run.certificate:
        holds = grids.certificate_holds(run.certificate)
        error = run.certificate.get("dtypes", {}).get("float64", {}).get("rel_l2")
        detail = "" if error is None else f"relative L2 {formats.scientific(error)} in float64"
        add("merged model", "exact" if holds else "not exact", detail, "good" if holds else "bad")
    return tiles


def _final_metrics(summary: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """The split that the run is judged by: test where there is one, else validation."""
    metrics = summary.get("metrics", {})
    for split in ("test", "val", "train"):
        if metrics.get(split):
            return split, metrics[split]
    return "", {}


def _share(summary: Mapping[str, Any]) -> str:
    trainable, total = summary.get("trainable_parameters"), summary.get("parameters")
    return formats.percent(trainable / total, 2) if trainable is not None and total else ""


# --- training and results -------------------------------------------------------------------------------


def _training(run: Run) -> dict[str, Any]:
    from refold.report import figures

    best, metric = run.summary.get("best_epoch"), run.summary.get("selected_by")
    curves = figures.learning_curves(run.metrics, best_epoch=best)
    metrics = run.summary.get("metrics")
    return {
        "curves": [_svg(figure, f"{name} by epoch") for name, figure in curves.items()],
        "chosen": f"The dotted line marks epoch {best}, chosen on validation by {grids.metric_title(metric)}."
        if curves and best is not None and metric
        else "",
        "metrics": grids.metrics_grid(metrics) if metrics else None,
    }


def _results(run: Run) -> dict[str, Any]:
    from refold.report import figures

    summary = run.summary
    classes, confusion, rows = summary.get("classes"), summary.get("confusion"), summary.get("per_class")
    split = summary.get("evaluated_split") or ""
    page: dict[str, Any] = {
        "split": grids.SPLITS.get(split, split),
        "per_class": grids.per_class_grid(rows) if rows else None,
        **dict.fromkeys(("confusion", "counts", "pairs", "scatter", "regression")),
    }
    if confusion and classes:
        page["confusion"] = _svg(figures.confusion_matrix(confusion, classes), "Confusion matrix")
        if len(classes) <= MAX_CONFUSION:
            page["counts"] = grids.confusion_grid(confusion, classes)
        if len(classes) > 2:
            page["pairs"] = grids.confused_pairs_grid(confusion, classes, limit=10)
    if summary.get("task") == "regress" and run.predictions:
        targets, predictions = run.values()
        scatter = figures.regression_scatter(targets, predictions)
        page["scatter"] = _svg(scatter, "Predicted against true values")
        page["regression"] = _regression_grid(targets, predictions)
    return page


def _regression_grid(targets: Sequence[float], predictions: Sequence[float]) -> Grid:
    import torch

    from refold.training.metrics import regression_metrics

    values = regression_metrics(torch.tensor(predictions), torch.tensor(targets))
    rows = [(grids.metric_title(name), formats.metric(name, value)) for name, value in values.items()]
    return Grid("Errors", ("measure", "value"), (*rows, ("images", formats.count(len(targets)))))


def _svg(figure: Any, label: str) -> Markup:
    from markupsafe import Markup

    from refold.report import figures

    return Markup(figures.to_svg(figure, label=label))  # matplotlib has escaped the text inside


# --- examples -------------------------------------------------------------------------------------------


def _examples(run: Run) -> dict[str, Any]:
    groups: dict[str, list[Thumbnail]] = {"wrong": [], "right": [], "shown": []}
    for item in run.thumbnails:
        groups["shown" if item.correct is None else "right" if item.correct else "wrong"].append(item)
    page: dict[str, Any] = {name: [_thumb(item) for item in items[:MAX_THUMBNAILS]] for name, items in groups.items()}
    overlays = run.overlays
    page["overlays"] = None if overlays is None else _data_uri(overlays, OVERLAYS_WIDTH)
    return page


def _thumb(item: Thumbnail) -> dict[str, Any]:
    return {
        "source": _data_uri(item.image),
        "alt": f"predicted {item.prediction}, true {item.target}",
        "target": item.target,
        "prediction": item.prediction,
        "score": formats.percent(item.score, 0) if item.score is not None and item.correct is not None else "",
        "name": "/".join(PurePath(item.path).parts[-2:]),  # not where the user keeps them
        "correct": item.correct,
    }


def _data_uri(image: np.ndarray, width: int = THUMBNAIL_SIDE) -> str:
    """A JPEG, no wider than that; thumbnails no higher either."""
    from PIL import Image

    picture = Image.fromarray(image)
    picture.thumbnail((width, width if width == THUMBNAIL_SIDE else picture.height))
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=88)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


# --- cost, exactness, configuration -----------------------------------------------------------------------


def _cost(run: Run) -> dict[str, Any]:
    summary, cost = run.summary, run.cost
    share = f" ({_share(summary)})" if _share(summary) else ""
    rows = [
        ("parameters", formats.count(summary.get("parameters"))),
        ("trainable parameters", formats.count(summary.get("trainable_parameters")) + share),
        ("adapter file", formats.size(summary.get("file_bytes"))),
        ("training time", formats.duration(summary.get("seconds"))),
        ("precision", summary.get("precision") or formats.NONE),
        ("attention kernel in training", summary.get("attention") or formats.NONE),
        ("peak memory", formats.size(summary.get("peak_memory"))),
    ]
    rows = [row for row in rows if row[1] != formats.NONE]
    where = (cost or {}).get("environment", {})
    machine = [
        where.get("cuda") or where.get("cpu"),
        f"{where['threads']} threads" if "threads" in where else None,
    ]
    return {
        "costs": Grid("Training", ("quantity", "value"), tuple(rows)) if rows else None,
        "latency": grids.cost_grid(cost) if cost and cost.get("rows") else None,
        "latency_note": "Measured side by side, round by round, on " + ", ".join(filter(None, machine)) + "."
        if any(machine)
        else "",
    }


def _certificate(run: Run) -> dict[str, Any] | None:
    certificate = run.certificate
    if not certificate:
        return None
    probe, folded = certificate.get("probe", {}), certificate.get("folded_layers")
    facts = []
    if probe:
        shape = " x ".join(str(n) for n in probe.get("shape", []))
        facts.append(f"Compared on {probe.get('inputs', formats.NONE)} probe inputs of shape {shape}.")
    if "bfloat16" in certificate.get("dtypes", {}):
        facts.append("bfloat16: the float32 merge, cast, against float64; the limit is twice bfloat16's own rounding.")
    if folded is not None:
        facts.append(f"{folded} layers received a fold.")
    return {
        "holds": grids.certificate_holds(certificate),
        "grid": grids.certificate_grid(certificate),
        "checks": grids.certificate_checks(certificate),
        "probe": " ".join(facts),
    }


def _configuration(run: Run) -> dict[str, Any]:
    return {
        "command": str(run.config.get("command") or ""),
        "settings": _record(run.settings),
        "versions": _record(run.config.get("environment") or {}),
    }


def _record(values: Mapping[str, Any]) -> Grid | None:
    rows = tuple((name.replace("_", " "), formats.plain(value)) for name, value in values.items())
    return Grid("", ("name", "value"), rows, text_columns=2) if rows else None
