"""The three export formats, read back by what will read them: onnxruntime, torch.export and timm."""

from __future__ import annotations

import json
import logging
import sys
import warnings

import onnxruntime
import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import refold
from refold import MergeError, MissingExtraError, RefoldError, backbones
from refold.export import export_onnx, export_program, export_weights

NAMES = ["test_vit", "test_convnext"]
SIZE = (64, 48)


@pytest.fixture(scope="module", params=NAMES)
def merged(request):
    """A backbone with a trained-looking RepAdapter folded in, and its preprocessing."""
    torch.manual_seed(0)
    loaded = backbones.load(request.param, pretrained=False, num_classes=5, image_size=SIZE)
    refold.attach(loaded.model, refold.RepAdapter(rank=4))
    refold.describe(loaded.model, classes=list("abcde"), preprocessing=loaded.preprocessing, task="classify")
    with torch.no_grad():
        for parameter in refold.trainable_parameters(loaded.model).values():
            parameter.add_(0.02 * torch.randn_like(parameter))
    refold.merge(loaded.model)
    return loaded


def pixels(batch: int) -> torch.Tensor:
    return torch.randint(0, 256, (batch, 3, *SIZE), dtype=torch.uint8, generator=torch.Generator().manual_seed(batch))


def expected(loaded: backbones.Loaded, images: torch.Tensor) -> torch.Tensor:
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (loaded.preprocessing.mean, loaded.preprocessing.std))
    with torch.no_grad():
        return loaded.model((images / 255 - mean) / std)


def test_onnx_takes_pixels_in_any_batch_and_is_one_file(merged, tmp_path, capfd):
    path = tmp_path / "new" / "model.onnx"
    result = export_onnx(merged.model, path, preprocessing=merged.preprocessing, with_preprocessing=True)
    assert [p.name for p in path.parent.iterdir()] == ["model.onnx"]
    assert (result.path, result.bytes) == (path, path.stat().st_size)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for batch in (1, 4):
        (output,) = session.run(["output"], {"images": pixels(batch).numpy()})
        torch.testing.assert_close(torch.from_numpy(output), expected(merged, pixels(batch)), rtol=0, atol=1e-5)
    assert 0 < result.max_abs < 1e-5
    assert 0 < result.max_rel < 1e-5
    facts = session.get_modelmeta().custom_metadata_map
    assert json.loads(facts["classes"]) == list("abcde")
    assert refold.Preprocessing.from_json(json.loads(facts["preprocessing"])) == merged.preprocessing
    assert capfd.readouterr() == ("", "")


def test_a_program_takes_any_batch_and_runs_without_the_model(merged, tmp_path):
    path = tmp_path / "model.pt2"
    result = export_program(merged.model, path, preprocessing=merged.preprocessing, with_preprocessing=True)
    assert result.bytes == path.stat().st_size
    assert result.max_rel is not None
    assert result.max_rel < 1e-5
    extra = {"classes": "", "task": ""}
    program = torch.export.load(path, extra_files=extra).module()
    for batch in (1, 4):
        torch.testing.assert_close(program(pixels(batch)), expected(merged, pixels(batch)), rtol=0, atol=1e-5)
    assert json.loads(extra["classes"]) == list("abcde")


def test_plain_weights_rebuild_the_model_with_timm_alone(merged, tmp_path):
    path = tmp_path / "model.safetensors"
    result = export_weights(merged.model, path)
    assert (result.bytes, result.max_abs, result.max_rel) == (path.stat().st_size, 0.0, 0.0)
    with safe_open(path, "pt") as file:
        facts = file.metadata()
    assert facts["num_classes"] == "5"
    assert json.loads(facts["classes"]) == list("abcde")
    assert refold.Preprocessing.from_json(json.loads(facts["preprocessing"])) == merged.preprocessing
    model = timm.create_model(facts["architecture"], **json.loads(facts["arguments"])).eval()
    model.load_state_dict(load_file(path), strict=True)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (merged.preprocessing.mean, merged.preprocessing.std))
    with torch.no_grad():
        assert torch.equal(model((pixels(2) / 255 - mean) / std), expected(merged, pixels(2)))


def test_plain_weights_load_back_by_spec(merged, tmp_path):
    export_weights(merged.model, tmp_path / "model.safetensors")
    again = backbones.load(merged.spec, weights=tmp_path / "model.safetensors", image_size=SIZE)
    assert torch.equal(expected(again, pixels(2)), expected(merged, pixels(2)))


@pytest.mark.parametrize(
    ("name", "method"), [("test_vit", refold.RepAdapter(rank=4)), ("test_convnext", refold.LoRA(rank=4))]
)
def test_an_unmerged_model_exports_as_a_graph_but_not_as_plain_weights(name, method, tmp_path):
    loaded = backbones.load(name, pretrained=False, num_classes=5, image_size=SIZE)
    refold.attach(loaded.model, method)
    with torch.no_grad():
        for parameter in refold.trainable_parameters(loaded.model).values():
            parameter.add_(0.02 * torch.randn_like(parameter))
    loaded.model.train()
    result = export_onnx(loaded.model, tmp_path / "model.onnx", preprocessing=loaded.preprocessing)
    assert result.max_rel is not None
    assert result.max_rel < 1e-5
    assert loaded.model.training
    export_program(loaded.model, tmp_path / "model.pt2", preprocessing=loaded.preprocessing)
    with pytest.raises(MergeError, match=r"not merged.*Call refold\.merge"):
        export_weights(loaded.model, tmp_path / "model.safetensors")
    assert not (tmp_path / "model.safetensors").exists()


def test_export_leaves_modes_logging_and_warnings_as_they_were(tmp_path):
    loaded = backbones.load("test_vit", pretrained=False, num_classes=2, image_size=SIZE)
    loaded.model.train()
    loaded.model.blocks[0].eval()
    before = [module.training for module in loaded.model.modules()]
    export_onnx(loaded.model, tmp_path / "m.onnx", preprocessing=loaded.preprocessing, check=False)
    assert [module.training for module in loaded.model.modules()] == before
    assert logging.root.manager.disable == logging.NOTSET
    with pytest.raises(UserWarning, match="still an error"):
        warnings.warn("still an error", UserWarning, stacklevel=1)


class _Branching(torch.nn.Module):
    """Looks at values: nothing a graph can express."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(3, 2)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features = images.mean((-2, -1))
        return self.layer(features) if features.sum().item() > 0 else features[:, :2]


class _FixedBatch(torch.nn.Module):
    """Its graph holds for one batch size only."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(3, 2)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.layer(images.mean((-2, -1))) + torch.zeros(int(images.shape[0]), 1)


@pytest.mark.parametrize("model", [_Branching(), _FixedBatch()], ids=["branching", "fixed batch"])
def test_what_cannot_be_exported_is_one_clear_error_and_writes_nothing(model, tmp_path):
    preprocessing = refold.Preprocessing(size=(8, 8))
    for export, name in ((export_onnx, "m.onnx"), (export_program, "m.pt2")):
        (tmp_path / name).write_text("old")
        with pytest.raises(RefoldError, match="cannot be exported"):
            export(model, tmp_path / name, preprocessing=preprocessing)
        assert (tmp_path / name).read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 2


def test_bad_requests_are_clear_errors(tmp_path, monkeypatch):
    preprocessing = refold.Preprocessing(size=(8, 8))
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 2, 8), torch.nn.Flatten())
    with pytest.raises(RefoldError, match=r"must end in \.pt2"):
        export_program(model, tmp_path / "m.pt", preprocessing=preprocessing)
    with pytest.raises(RefoldError, match=r"float16, not float32.*model\.float"):
        export_onnx(torch.nn.Linear(2, 2).half(), tmp_path / "m.onnx", preprocessing=preprocessing)
    monkeypatch.setattr("refold.export.onnx_file._LIMIT", 100)
    with pytest.raises(RefoldError, match="do not fit in one ONNX file"):
        export_onnx(model, tmp_path / "m.onnx", preprocessing=preprocessing)
    monkeypatch.setattr("refold.export.onnx_file.find_spec", lambda name: None if name == "onnxscript" else sys)
    with pytest.raises(MissingExtraError, match=r"'onnxscript' is not installed.*refold\[export\]"):
        export_onnx(model, tmp_path / "m.onnx", preprocessing=preprocessing)


class _Changing(torch.nn.Module):
    """Computes something else when it is traced."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(3, 2)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        output = self.layer(images.mean((-2, -1)))
        return 1.01 * output if torch.compiler.is_compiling() else output


def test_outputs_that_differ_are_refused_before_anything_is_written(tmp_path):
    preprocessing = refold.Preprocessing(size=(8, 8))
    for export, name in ((export_onnx, "m.onnx"), (export_program, "m.pt2")):
        with pytest.raises(RefoldError, match=r"differ from the model's by 1\.0e-02"):
            export(_Changing(), tmp_path / name, preprocessing=preprocessing)
    assert not list(tmp_path.iterdir())
