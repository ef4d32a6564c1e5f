"""The page of real run folders: small models trained in the tests, their files as training writes them."""

from __future__ import annotations

import html.parser
import json
import re
import shutil

import numpy as np
import pytest
import torch

from refold.errors import DataError, RefoldError
from refold.report import write_report
from refold.report.run import read_run
from refold.training.metrics import (
    confusion_matrix,
    per_class_table,
)
from run_files import CLASSES, HOSTILE, write_merge_files, write_run


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
