"""The page of real run folders: small models trained here, their files written as training writes them."""

from __future__ import annotations

import csv
import html.parser
import json
import re
import shutil
import time

import numpy as np
import pytest
import torch
from torch import nn

from refold.bench.measure import environment, peak_memory
from refold.errors import DataError, RefoldError
from refold.report import write_report
from refold.report.run import read_run
from refold.training.metrics import (
    classification_metrics,
    confusion_matrix,
    multilabel_metrics,
    per_class_table,
    regression_metrics,
)

HOSTILE = "<script>alert('x')</script>"
CLASSES = ["good & fine", HOSTILE, "$5 off_the_rack$"]
SIDE = 24


def make_images(task, count, seed):
    """Noisy stripes, lying, standing or both: uint8 (N, H, W, 3) and the targets of the task."""
    rng = np.random.default_rng(seed)
    kind, strength = rng.integers(0, 3, count), rng.uniform(0.2, 1.0, count)
    wave = np.sin(np.arange(SIDE) * 1.6)
    lying, standing = np.broadcast_to(wave[:, None], (SIDE, SIDE)), np.broadcast_to(wave, (SIDE, SIDE))
    patterns = np.stack([lying, standing, (lying + standing) / 2])[kind] * strength[:, None, None]
    grey = 128 + 60 * patterns + rng.normal(0, 60, patterns.shape)
    images = np.repeat(grey.clip(0, 255).astype(np.uint8)[..., None], 3, axis=3)
    if task == "classify":
        return images, torch.from_numpy(kind)
    if task == "regress":
        return images, torch.from_numpy(strength * (kind == 0)).float()
    return images, torch.from_numpy(np.stack([kind != 1, kind != 0, strength > 0.6], 1)).float()


def scores_of(task, outputs):
    return {"classify": lambda o: o.softmax(1), "multilabel": torch.sigmoid, "regress": lambda o: o[:, 0]}[task](
        outputs
    )


def metrics_of(task, outputs, targets):
    functions = {
        "classify": classification_metrics,
        "multilabel": multilabel_metrics,
        "regress": regression_metrics,
    }
    return functions[task](scores_of(task, outputs), targets)


def loss_of(task, outputs, targets):
    if task == "classify":
        return nn.functional.cross_entropy(outputs, targets)
    if task == "multilabel":
        return nn.functional.binary_cross_entropy_with_logits(outputs, targets)
    return nn.functional.mse_loss(outputs[:, 0], targets)


def write_run(folder, task, *, epochs=4):
    """Train a small network on made-up stripes and leave the files of a run."""
    torch.manual_seed(0)
    folder.mkdir(parents=True, exist_ok=True)
    sets = {split: make_images(task, n, seed) for seed, (split, n) in enumerate([("train", 240), ("val", 90)])}
    tensors = {s: (torch.from_numpy(i[..., 0].copy()).float() / 128 - 1, t) for s, (i, t) in sets.items()}
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(SIDE * SIDE, 16), nn.Tanh(), nn.Linear(16, 1 if task == "regress" else 3)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    lines, start = [], time.perf_counter()
    for epoch in range(epochs):
        lr = optimizer.param_groups[0]["lr"]
        for rows in torch.randperm(240).split(40):
            optimizer.zero_grad()
            loss_of(task, model(tensors["train"][0][rows]), tensors["train"][1][rows]).backward()
            optimizer.step()
        schedule.step()
        for split, (images, targets) in tensors.items():
            with torch.no_grad():
                outputs = model(images)
            line = {
                "epoch": epoch + 1,
                "step": 6 * (epoch + 1),
                "split": split,
                "seconds": time.perf_counter() - start,
            }
            line["loss"] = float(loss_of(task, outputs, targets))
            lines.append(line | ({"lr": lr} if split == "train" else metrics_of(task, outputs, targets)))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    with torch.no_grad():
        outputs = model(tensors["val"][0])
    targets, scores = tensors["val"][1], scores_of(task, outputs)
    summary = {
        "method": "RepAdapter(rank=8)",
        "task": task,
        "classes": None if task == "regress" else CLASSES,
        "images": {"train": 240, "val": 90, "test": 0},
        "skipped": [{"path": "stripes/broken.png", "reason": HOSTILE}],
        "parameters": 21_704_450 + sum(p.numel() for p in model.parameters()),
        "trainable_parameters": sum(p.numel() for p in model.parameters()),
        "file_bytes": 4 * sum(p.numel() for p in model.parameters()),
        "seconds": time.perf_counter() - start,
        "epochs": epochs,
        "best_epoch": epochs,
        "selected_by": {"classify": "accuracy", "multilabel": "map", "regress": "mae"}[task],
        "precision": "fp32",
        "attention": "math",
        "peak_memory": peak_memory("cpu"),
        "metrics": {"val": {"loss": lines[-1]["loss"], **metrics_of(task, outputs, targets)}},
        "evaluated_split": "val",
    }
    if task != "regress":
        summary["per_class"] = per_class_table(scores, targets, CLASSES)
    if task == "classify":
        summary["confusion"] = confusion_matrix(scores.argmax(1), targets, 3)
    (folder / "summary.json").write_text(json.dumps(summary))
    config = {
        "data": "/somewhere/private/stripes",
        "model": "timm/test_vit",
        "method": {"name": "RepAdapter", "rank": 8, "groups": 2, "scale": 1.0, "sites": None},
        "epochs": epochs,
        "lr": 3e-3,
        "pretrained": True,
        "seed": 0,
        "output": HOSTILE,
        "environment": environment(),
        "command": "refold train stripes --model timm/test_vit",
    }
    (folder / "config.json").write_text(json.dumps(config))
    write_predictions(folder, task, sets["val"][0], scores, targets)
    return summary


def write_predictions(folder, task, images, scores, targets):
    named = {
        "classify": lambda v: CLASSES[int(v)],
        "multilabel": lambda v: [c for c, on in zip(CLASSES, v, strict=True) if on > 0.5],
        "regress": float,
    }[task]
    predictions = scores.argmax(1) if task == "classify" else scores
    rows = []
    for i in range(len(images)):
        truth, guess = named(targets[i]), named(predictions[i])
        score = float(scores[i].max()) if task == "classify" else None
        correct = None if task == "regress" else truth == guess
        path = f"/somewhere/private/stripes/val/{i:03}.png"
        rows.append({"path": path, "target": truth, "prediction": guess, "score": score, "correct": correct})
    with (folder / "predictions.csv").open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["path", "target", "prediction"])
        writer.writerows((r["path"], r["target"], r["prediction"]) for r in rows)
    (folder / "thumbnails").mkdir()
    shown = rows[:30]
    np.savez(folder / "thumbnails" / "thumbnails.npz", images=images[:30])
    (folder / "thumbnails" / "thumbnails.json").write_text(
        json.dumps([{"index": i, **row} for i, row in enumerate(shown)])
    )


def write_merge_files(folder, *, rel_l2=2.2e-15):
    dtypes = {
        "float64": {"max_abs": 3.1e-15, "max_rel": 4.0e-13, "rel_l2": rel_l2, "limit": 1e-10},
        "float32": {"max_abs": 1.7e-6, "max_rel": 2.0e-4, "rel_l2": 8.4e-7, "limit": 1e-5},
        "bfloat16": {"max_abs": 2.1e-2, "max_rel": 0.9, "rel_l2": 6.4e-3, "limit": 7.1e-3},
    }
    certificate = {
        "dtypes": dtypes,
        "probe": {"inputs": 4, "shape": [3, 224, 224]},
        "keys_unchanged": True,
        "shapes_unchanged": True,
        "hooks_left": 0,
        "extra_modules": 0,
        "parameters": {"backbone": 21_704_450, "merged": 21_704_450},
        "operations": {"backbone": 12_200_000_000, "merged": 12_200_000_000},
        "folded_layers": 24,
        "refold": "0.1.0",
        "torch": torch.__version__,
    }
    (folder / "certificate.json").write_text(json.dumps(certificate))
    rows = [
        {
            "name": name,
            "batch": batch,
            "median_ms": batch * ms,
            "low_ms": batch * ms * 0.98,
            "high_ms": batch * ms * 1.03,
            "ratio": ms / 30.0,
        }
        for batch in (1, 16)
        for name, ms in (("backbone", 30.0), ("unmerged", 34.5), ("merged", 30.1))
    ]
    (folder / "cost.json").write_text(json.dumps({"rows": rows, "environment": environment()}))


class Page(html.parser.HTMLParser):
    """The parsed page: tags with attributes, text, and whether every tag was closed in order."""

    VOID = frozenset({"meta", "img", "br"})

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.texts = [], [], []
        self.feed(text)
        self.close()
        assert not self.open, f"left open: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.texts).split())

    def sections(self):
        return [attrs["id"] for tag, attrs in self.tags if tag == "section"]


def page_of(folder):
    return Page(write_report(folder).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The untouched folder and the summary of one run of each task."""
    parent = tmp_path_factory.mktemp("trained")
    return {task: (parent / task, write_run(parent / task, task)) for task in ("classify", "multilabel", "regress")}


@pytest.fixture
def copy_of(trained, tmp_path):
    """A copy of a task's run to look at or to damage."""

    def copy(task="classify"):
        folder, summary = trained[task]
        shutil.copytree(folder, tmp_path / "run")
        return tmp_path / "run", summary

    return copy


def test_page_holds_everything_of_a_classification_run(copy_of):
    folder, summary = copy_of()
    write_merge_files(folder)
    page = page_of(folder)
    assert page.sections() == ["training", "results", "examples", "cost", "exactness", "configuration"]
    accuracy = summary["metrics"]["val"]["accuracy"]
    assert f"{100 * accuracy:.1f} %" in page.text
    assert f"{summary['trainable_parameters']:,}" in page.text
    assert "RepAdapter on timm/test_vit" in page.text
    assert "Data: stripes · 3 classes · 240 training / 90 validation images · rank=8" in page.text
    assert "marks epoch 4, chosen on validation by accuracy" in page.text
    assert f"stripes/broken.png {HOSTILE}" in page.text
    assert "refold train stripes --model timm/test_vit" in page.text
    assert "Holds: the merged model computes what the adapted one did" in page.text
    assert "2.2e-15" in page.text
    assert "backbone 1 30.0 29.4 to 30.9 1.000" in page.text
    for row in summary["per_class"]:
        numbers = " ".join(f"{row[name]:.3f}" for name in ("precision", "recall", "f1", "auroc"))
        assert f"{row['class']} {numbers} {row['support']}" in page.text
    for row in summary["confusion"]:
        assert " ".join(f"{n:,}" for n in row) in page.text
    right = json.loads((folder / "thumbnails" / "thumbnails.json").read_text())
    wrong_shown = sum(attrs.get("class") == "is-bad" for tag, attrs in page.tags if tag == "figure")
    assert wrong_shown == sum(not row["correct"] for row in right) > 0
    labels = [attrs["aria-label"] for tag, attrs in page.tags if tag == "svg"]
    assert {"loss by epoch", "accuracy by epoch", "learning rate by epoch", "Confusion matrix"} < set(labels)


def test_page_is_self_contained_and_runs_no_script(copy_of):
    folder, _ = copy_of()
    write_merge_files(folder)
    page = page_of(folder)
    assert not any(tag in ("script", "link", "iframe", "object") for tag, _ in page.tags)
    for _, attrs in page.tags:
        assert not any(name.startswith("on") for name in attrs)
        for name in ("src", "href", "xlink:href"):
            target = attrs.get(name, "#")
            assert target.startswith(("data:image/", "#"))
    text = (folder / "report.html").read_text()
    assert "@import" not in text
    assert not re.search(r"url\((?!['\"]?#)", text)
    assert any(attrs.get("http-equiv") == "Content-Security-Policy" for _, attrs in page.tags)


def test_text_of_the_user_is_escaped_and_shown(copy_of):
    folder, _ = copy_of()
    page = page_of(folder)
    assert page.texts.count(HOSTILE) >= 3  # figure, tables, thumbnails
    assert "$5 off_the_rack$" in page.texts  # neither TeX nor markup
    assert "good & fine" in page.texts
    assert "/somewhere/private/stripes/val" not in " ".join(t for t in page.texts if ".png" in t)
    assert "val/000.png" in page.texts


def test_figures_take_the_colours_of_the_page(copy_of):
    text = write_report(copy_of()[0]).read_text()
    svg = text[text.index("<svg") : text.rindex("</svg>")]
    assert "currentColor" in svg
    assert "var(--rule)" in svg
    assert "#1c2530" not in svg
    assert "prefers-color-scheme: dark" in text


def test_missing_optional_files_are_left_out(copy_of):
    folder, _ = copy_of()
    for file in ("thumbnails/thumbnails.npz", "predictions.csv"):
        (folder / file).unlink()
    page = page_of(folder)
    assert page.sections() == ["training", "results", "cost", "configuration"]
    assert "exact" not in page.text.lower()
    assert "ratio to backbone" not in page.text


def test_killed_run_is_shown_as_far_as_it_went(copy_of):
    folder, _ = copy_of()
    (folder / "summary.json").unlink()
    lines = (folder / "metrics.jsonl").read_text()
    (folder / "metrics.jsonl").write_text(lines[: len(lines) - 40])
    run = read_run(folder)
    assert (len(run.metrics), run.unreadable) == (7, 1)
    page = page_of(folder)
    assert "This run is not finished" in page.text
    assert "One line of metrics.jsonl could not be read" in page.text
    assert page.sections()[0] == "training"


def test_repeated_epochs_of_a_resumed_run_count_once(copy_of):
    folder, _ = copy_of()
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    again = json.dumps({**json.loads(lines[-1]), "loss": 0.125})
    (folder / "metrics.jsonl").write_text("\n".join([*lines, '{"epoch": 4, "st', again]) + "\n")
    run = read_run(folder)
    assert len(run.metrics) == len(lines)
    assert run.metrics[-1]["loss"] == 0.125


def test_multilabel_run(copy_of):
    folder, summary = copy_of("multilabel")
    page = page_of(folder)
    assert "class precision recall F1 AUROC images" in page.text
    assert "Confusion" not in page.text
    assert f"validation mAP {summary['metrics']['val']['map']:.3f}" in page.text
    for row in summary["per_class"]:
        assert f"{row['auroc']:.3f}" in page.text
    assert f"{CLASSES[0]}, {HOSTILE}" in page.text  # an image with two labels


def test_regression_run(copy_of):
    folder, summary = copy_of("regress")
    page = page_of(folder)
    values = summary["metrics"]["val"]
    assert f"MAE {values['mae']:.3f} RMSE {values['rmse']:.3f} R² {values['r2']:.3f} images 90" in page.text
    labels = [attrs["aria-label"] for tag, attrs in page.tags if tag == "svg"]
    assert labels[-1] == "Predicted against true values"
    assert "MAE by epoch" in labels
    assert not any(attrs.get("class") == "is-bad" for _, attrs in page.tags)


def test_failed_certificate_is_said_so(copy_of):
    folder, _ = copy_of()
    write_merge_files(folder, rel_l2=3e-9)
    page = page_of(folder)
    assert "Fails: the merged model differs" in page.text
    assert "not exact" in page.text
    assert page.texts.count("FAILS") == 1


def test_many_classes_stay_readable(copy_of):
    folder, summary = copy_of()
    rng = np.random.default_rng(0)
    n = 120
    targets = torch.from_numpy(rng.integers(0, n, 2000))
    scores = torch.from_numpy(rng.uniform(0, 1, (2000, n)))
    scores[torch.arange(2000), targets] += 0.98
    classes = [f"species {i}" for i in range(n)]
    summary |= {
        "classes": classes,
        "per_class": per_class_table(scores, targets, classes),
        "confusion": confusion_matrix(scores.argmax(1), targets, n),
    }
    (folder / "summary.json").write_text(json.dumps(summary))
    page = page_of(folder)
    assert "Per class: 120 classes" in page.text
    assert "Most frequent mistakes" in page.text
    assert "The confusion matrix as a table" not in page.text
    assert (folder / "report.html").stat().st_size < 1_000_000


def test_folders_that_are_no_run_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"nothing: no such folder\. Give the folder that `refold train` wrote"):
        write_report(tmp_path / "nothing")
    with pytest.raises(DataError, match="this folder is no run"):
        write_report(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(DataError, match=r"needs config\.json and metrics\.jsonl or summary\.json"):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize(
    ("file", "content", "reason"),
    [
        ("config.json", b"{", "config.json: cannot be read"),
        ("summary.json", b"[1]", r"summary.json: cannot be read \(a JSON object was expected, not list"),
        ("cost.json", b"\xff\xfe\x00", "cost.json: cannot be read"),
        ("predictions.csv", b"a,b\n1,2\n", r"predictions.csv: cannot be read \(it has no column 'path'"),
        ("thumbnails/thumbnails.npz", b"no archive", "thumbnails.npz: cannot be read"),
        ("thumbnails/thumbnails.json", b'[{"index": 99, "target": 0, "prediction": 0}]', "IndexError"),
    ],
)
def test_broken_files_are_named(copy_of, file, content, reason):
    folder, _ = copy_of()
    (folder / file).write_bytes(content)
    with pytest.raises(DataError, match=reason):
        write_report(folder)


def test_thumbnails_of_another_shape_are_refused(copy_of):
    folder, _ = copy_of()
    np.savez(folder / "thumbnails" / "thumbnails.npz", images=np.zeros((30, 8, 8), np.float32))
    with pytest.raises(DataError, match=r"uint8 \(N, H, W, 3\) was expected, not float32 \(30, 8, 8\)"):
        write_report(folder)


def test_words_among_the_values_of_a_regression_are_named(copy_of):
    folder, _ = copy_of("regress")
    with (folder / "predictions.csv").open("a") as stream:
        stream.write("a.png,many,0.5\n")
    with pytest.raises(DataError, match=r"predictions\.csv: cannot be read \(could not convert .* 'many'"):
        write_report(folder)


def test_a_page_that_cannot_be_written_is_one_error(copy_of):
    folder, _ = copy_of()
    (folder / "report.html").mkdir()
    with pytest.raises(RefoldError, match=r"report\.html: cannot be written"):
        write_report(folder)
    assert not list(folder.glob(".report*"))
