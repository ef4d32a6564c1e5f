"""The report reads what training really writes: one tiny run, its certificate and its latency."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch
from PIL import Image

from refold.bench import measure
from refold.certificate import certify
from refold.merging import merge
from refold.methods import METHODS
from refold.report import write_report
from refold.report.run import read_run
from refold.training import train

pytestmark = pytest.mark.timeout(120)


def write_images(folder):
    rng = np.random.default_rng(0)
    for name in ("<b>lying", "standing"):
        (folder / name).mkdir(parents=True)
        for index in range(10):
            stripes = np.indices((40, 40))[int(name == "standing")] // 5 % 2 * 120
            noisy = stripes + rng.integers(0, 120, (40, 40))
            Image.fromarray(noisy.astype(np.uint8)).save(folder / name / f"{index}.png")


def test_report_of_a_run_of_refold_train(tmp_path):
    write_images(tmp_path / "stripes")
    run_dir = tmp_path / "run"
    result = train(
        data=tmp_path / "stripes",
        model="timm/test_vit",
        pretrained=False,
        image_size=32,
        method=METHODS["RepAdapter"](),
        output=run_dir,
        epochs=2,
        batch_size=4,
        precision="fp32",
        progress=False,
    )
    (run_dir / "certificate.json").write_text(json.dumps(certify(result.model)))
    merged = copy.deepcopy(result.model)
    merge(merged)
    images = torch.randn(1, 3, 32, 32)
    functions = {"unmerged": lambda: result.model(images), "merged": lambda: merged(images)}
    timings = measure.latency(functions, rounds=2, min_seconds=0.0)
    rows = measure.cost_rows(timings, batch=1, reference="merged")
    (run_dir / "cost.json").write_text(json.dumps({"rows": rows, "environment": measure.environment()}))

    run = read_run(run_dir)
    assert [(row["split"], row["epoch"]) for row in run.metrics] == [
        ("train", 1), ("val", 1), ("train", 2), ("val", 2)
    ]  # fmt: skip
    assert {item.target for item in run.thumbnails} <= {"<b>lying", "standing"}
    assert len(run.predictions) == 4
    page = write_report(run_dir).read_text(encoding="utf-8")
    for section in ("training", "results", "examples", "cost", "exactness", "configuration"):
        assert f'<section id="{section}">' in page
    summary = result.summary
    assert f"{summary['trainable_parameters']:,}" in page
    assert f"{100 * summary['metrics']['val']['accuracy']:.1f} %" in page
    assert "Holds: the merged model computes" in page
    assert "<b>lying" not in page
    assert "&lt;b&gt;lying" in page
