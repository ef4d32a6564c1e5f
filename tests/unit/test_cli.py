"""The commands end to end on a small model and real files, and one clear line for every bad input."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from rich.console import Console
from safetensors.torch import load_file

import refold
from commands import run
from refold.cli.options import parse_method


def test_the_installed_command_starts() -> None:
    command = [str(Path(sys.executable).parent / "refold"), "--help"]
    assert "merge" in subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_train_writes_a_whole_run_folder(workplace: Path) -> None:
    names = {path.name for path in (workplace / "run").iterdir()}
    assert {
        "config.json",
        "metrics.jsonl",
        "adapter.safetensors",
        "report.html",
        "summary.json",
        "tensorboard",
    } <= names
    header = refold.store.read_header(workplace / "run" / "adapter.safetensors")
    assert header.method == refold.RepAdapter(rank=4)
    assert header.classes == ("bright", "dark")


def test_evaluate_prints_the_metrics_of_the_summary(workplace: Path) -> None:
    done = run("evaluate", "run", cwd=workplace)
    assert done.returncode == 0, done.stderr
    accuracy = json.loads((workplace / "run" / "summary.json").read_text())["metrics"]["test"]["accuracy"]
    assert f"{100 * accuracy:.1f}" in done.stdout or f"{accuracy:.3f}" in done.stdout


def test_predict_writes_one_row_an_image(workplace: Path) -> None:
    done = run("predict", "run", "photos", "-o", "out.csv", cwd=workplace)
    assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader((workplace / "out.csv").read_text().splitlines()))
    assert len(rows) == 24
    assert {row["prediction"] for row in rows} <= {"bright", "dark"}
    assert all(abs(float(row["score bright"]) + float(row["score dark"]) - 1) < 1e-5 for row in rows)


def test_merge_writes_plain_weights_and_a_certificate_that_holds(workplace: Path) -> None:
    import timm

    done = run("merge", "run", "-o", "merged.safetensors", cwd=workplace)
    assert done.returncode == 0, done.stderr
    assert json.loads((workplace / "merged.certificate.json").read_text())["holds"] is True
    plain = timm.create_model("test_vit", num_classes=2)
    plain.load_state_dict(load_file(workplace / "merged.safetensors"), strict=True)
    from refold.training import resolve

    images = torch.randn(2, 3, 160, 160)
    with torch.no_grad():
        torch.testing.assert_close(plain.eval()(images), resolve(workplace / "run").model(images), rtol=1e-4, atol=1e-5)


def test_export_onnx_takes_pixels(workplace: Path) -> None:
    import onnxruntime

    done = run("export", "run", "-o", "model.onnx", "--preprocessing", cwd=workplace)
    assert done.returncode == 0, done.stderr
    session = onnxruntime.InferenceSession(workplace / "model.onnx", providers=["CPUExecutionProvider"])
    pixels = torch.randint(0, 256, (3, 3, 160, 160), dtype=torch.uint8)
    (logits,) = session.run(None, {session.get_inputs()[0].name: pixels.numpy()})
    assert logits.shape == (3, 2)


def test_explain_shows_sites_of_a_run_and_of_a_model(workplace: Path) -> None:
    of_run = run("explain", "run", cwd=workplace)
    assert "blocks.0.attn.qkv" in of_run.stdout, of_run.stderr
    of_model = run("explain", "timm/test_convnext", "--method", "LoRA(rank=2)", cwd=workplace)
    assert "stages.0.blocks.0.mlp.fc1" in of_model.stdout, of_model.stderr


def test_models_lists_what_a_pattern_matches() -> None:
    assert "packaged/vit_small_focus" in run("models", "*focus*", cwd=Path.cwd()).stdout


def shelf_row(text: str, name: str) -> list[str]:
    """The cells of a method's row, of which the first line names it."""
    line = next(line for line in text.splitlines() if line.startswith(f"│ {name} "))
    return [cell.strip() for cell in line.split("│")[1:-1]]


def test_methods_lists_all_with_what_they_cost() -> None:
    done = run("methods", cwd=Path.cwd())
    assert done.returncode == 0, done.stderr
    assert all(shelf_row(done.stdout, name) for name in refold.METHODS)
    assert shelf_row(done.stdout, "RepAdapter")[2:5] == ["239,808", "yes", "none"]
    assert shelf_row(done.stdout, "AdaptFormer")[2:5] == ["156,768", "no", "+0.17 %"]
    assert shelf_row(done.stdout, "BitFit")[2:] == [
        *("102,912", "in place", "none", "language, classification", "arXiv 2106.10199")
    ]


def test_methods_cuts_nothing_off_on_a_narrow_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("refold.cli.shelf.console", Console(width=80))
    done = run("methods", cwd=Path.cwd())
    assert done.returncode == 0, done.stderr
    assert all(shelf_row(done.stdout, name)[0] == name for name in refold.METHODS)
    assert "2302.08106" in done.stdout
    assert "…" not in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80


def test_a_launched_process_leaves_the_others_when_all_went_well() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        assert run("methods", "nothing", cwd=Path.cwd()).returncode == 1
        assert dist.is_initialized()  # the others may be waiting for it, and leaving would wait for them
        assert run("methods", "LoRA", cwd=Path.cwd()).returncode == 0
        assert not dist.is_initialized()
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def test_methods_leaves_out_what_it_cannot_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    done = run("methods", cwd=Path.cwd())
    assert done.returncode == 0, done.stderr
    assert "left out: the package 'timm' is not installed" in done.stdout
    assert shelf_row(done.stdout, "AdaptFormer")[2:] == ["no", "classification, video", "arXiv 2205.13535"]
    assert "156,768" not in done.stdout


def test_methods_shows_one_in_full_with_other_settings() -> None:
    done = run("methods", "adaptformer(hidden=64)", cwd=Path.cwd())
    assert done.returncode == 0, done.stderr
    assert "out = x + MLP(LN(x)) + s U drop(ReLU(D x + a)) + s b" in done.stdout
    assert shelf_row(done.stdout, "hidden")[1] == "8"
    assert "AdaptFormer(hidden=64): parameters 1,189,632, extra compute +1.3 %, merges no" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("train", "nowhere", "--model", "timm/test_vit"), "no such file or folder"),
        (("train", "photos", "--model", "timm/nonsense"), "knows no such model"),
        (("train", "photos", "--method", "RepAdaptor"), "unknown method"),
        (("train", "photos", "--method", "RepAdapter(rnk=4)"), "rnk"),
        (("train", "photos", "--method", "RepAdapter(rank=0)"), "rank=0"),
        (("train", "photos", "--model", "timm/test_vit", "--epochs", "0", "-o", "x"), "epochs"),
        (("train", "photos", "--model", "timm/test_vit", "-o", "run"), "not empty"),
        (("evaluate", "photos"), "config.json"),
        (("predict", "run", "nothing-here"), "nothing-here"),
        (("merge", "missing.safetensors"), "missing.safetensors"),
        (("explain", "timm/test_vit", "--method", "LoRA(sites='nose')"), "nose"),
        (("methods", "nose"), "METHOD: unknown method 'nose'"),
        (("methods", "LoRA(rank=0)"), "rank=0"),
    ],
)
def test_bad_input_is_one_line_and_a_failure(workplace: Path, arguments: tuple[str, ...], says: str) -> None:
    done = run(*arguments, cwd=workplace)
    assert done.returncode == 1
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("text", "method"),
    [
        ("RepAdapter", refold.RepAdapter()),
        ("repadapter(rank=16, scale=5)", refold.RepAdapter(rank=16, scale=5)),
        ("LoRA(sites=('attention', 'mlp'))", refold.LoRA(sites=("attention", "mlp"))),
        ("linearprobe()", refold.LinearProbe()),
    ],
)
def test_methods_are_named_as_they_print(text: str, method: refold.Method) -> None:
    assert parse_method(text) == method


@pytest.mark.parametrize(
    "text", ["", "RepAdapter(8)", "RepAdapter(rank=open('x'))", "__import__('os')", "a.b()", "LoRA(**{})"]
)
def test_methods_are_never_evaluated(text: str) -> None:
    with pytest.raises(refold.SiteError):
        parse_method(text)
