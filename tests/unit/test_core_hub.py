"""push_to_hub and hf-hub: sources, with the hub's client replaced by a folder; no real hub is asked."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import LocalTokenNotFoundError, OfflineModeIsEnabled
from torch import nn

import refold
from refold.header import HUB_FILE
from refold.preprocessing import Preprocessing
from zoo import CLASSES, build, images, perturb

yaml = pytest.importorskip("yaml")
REPO = "someone/pets-adapter"


class Hub:
    """Repositories as folders, and what the client was asked."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.calls: list[tuple[str, dict[str, Any]]] = []

    def create_repo(self, repo_id: str, **options: Any) -> str:
        self.calls.append(("create", {"repo_id": repo_id, **options}))
        (self.root / repo_id).mkdir(parents=True, exist_ok=options.get("exist_ok", False))
        return f"https://huggingface.co/{repo_id}"

    def upload_folder(self, *, repo_id: str, folder_path: str, **options: Any) -> None:
        self.calls.append(("upload", {"repo_id": repo_id, **options}))
        shutil.copytree(folder_path, self.root / repo_id, dirs_exist_ok=True)

    def hf_hub_download(self, repo_id: str, filename: str, revision: str | None = None) -> str:
        self.calls.append(("download", {"repo_id": repo_id, "filename": filename, "revision": revision}))
        return str(self.root / repo_id / filename)

    def files(self) -> set[str]:
        return {path.name for path in (self.root / REPO).iterdir()}

    def card(self) -> tuple[dict[str, Any], str]:
        _, metadata, text = (self.root / REPO / "README.md").read_text(encoding="utf-8").split("---\n", 2)
        return yaml.safe_load(metadata), text


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    found = Hub(tmp_path / "hub")
    for name in ("create_repo", "upload_folder", "hf_hub_download"):
        monkeypatch.setattr(huggingface_hub, name, getattr(found, name))
    return found


def trained(**described: Any) -> nn.Module:
    model = refold.attach(build("vit"), refold.RepAdapter(rank=4))
    perturb(refold.trainable_parameters(model))
    refold.describe(model, **described)
    return model


def test_what_is_pushed_loads_again(hub: Hub):
    model = trained()
    address = refold.push_to_hub(model, REPO)
    assert address == f"https://huggingface.co/{REPO}"
    assert hub.files() == {HUB_FILE, "README.md"}
    x = images(model)
    other = refold.load(build("vit"), f"hf-hub:{REPO}")
    assert torch.equal(other(x), model(x))
    assert [call for call, _ in hub.calls] == ["create", "upload", "download"]
    assert hub.calls[0][1] == {"repo_id": REPO, "private": None, "token": None, "exist_ok": True}


def test_from_pretrained_builds_the_backbone_and_loads(hub: Hub):
    pytest.importorskip("onnx")
    from refold import backbones

    loaded = backbones.load("packaged/vit_small_focus", num_classes=2, image_size=56)
    model = refold.attach(loaded.model, refold.LoRA(rank=2))
    perturb(refold.trainable_parameters(model))
    refold.describe(
        model, backbone="packaged/vit_small_focus", classes=["good", "bad"], preprocessing=Preprocessing(size=(56, 56))
    )
    refold.push_to_hub(model, f"hf-hub:{REPO}")
    metadata, text = hub.card()
    assert "base_model" not in metadata  # not on the hub
    assert f'refold.from_pretrained("hf-hub:{REPO}")' in text
    x = torch.randn(1, 3, 56, 56)
    assert torch.equal(refold.from_pretrained(f"hf-hub:{REPO}")(x), model.eval()(x))


def test_options_reach_the_hub(hub: Hub):
    refold.push_to_hub(trained(), REPO, private=True, token="secret", message="second try")
    assert hub.calls[0][1] | {"private": True, "token": "secret"} == hub.calls[0][1]
    assert hub.calls[1][1] | {"commit_message": "second try", "token": "secret"} == hub.calls[1][1]
    assert "secret" not in (hub.root / REPO / "README.md").read_text()


def test_a_revision_can_be_named(hub: Hub):
    refold.push_to_hub(trained(), REPO)
    refold.load(build("vit"), f"hf-hub:{REPO}@v1.0")
    assert hub.calls[-1] == ("download", {"repo_id": REPO, "filename": HUB_FILE, "revision": "v1.0"})


# -- the card --------------------------------------------------------------------------------------------------


def test_the_card_says_what_was_described(hub: Hub):
    model = trained(
        backbone="timm/vit_tiny_patch16_224.augreg_in21k",
        classes=["cat | dog", "bi\nrd", "fish"],
        preprocessing=Preprocessing(size=(32, 32)),
        task="classify",
        datasets=["user/pets"],
        metrics={"test": {"accuracy": 0.987, "loss": 0.1}},
        license="apache-2.0",
    )
    refold.push_to_hub(model, REPO)
    metadata, text = hub.card()
    assert metadata == {
        "library_name": "refold",
        "base_model": "timm/vit_tiny_patch16_224.augreg_in21k",
        "base_model_relation": "adapter",
        "license": "apache-2.0",
        "datasets": ["user/pets"],
        "metrics": ["accuracy", "loss"],
        "pipeline_tag": "image-classification",
        "tags": ["refold", "adapter", "repadapter", "vision"],
    }
    cells = [line.strip("| ").split(" | ", 1) for line in text.splitlines() if line.startswith("| ")]
    rows = dict(pair for pair in cells if len(pair) == 2)
    assert rows["`rank`"] == "4"
    assert "2302.08106" in rows["Method"]
    assert rows["Backbone"] == "timm/vit_tiny_patch16_224.augreg_in21k"
    assert rows["Adapted layers"] == "4"
    assert rows["Classes"] == r"3: cat \| dog, bi rd, fish"
    assert rows["Input"].startswith("32 x 32, 3 channels, bicubic")
    assert rows["test accuracy"] == "0.987"
    assert rows["File"] == f"`{HUB_FILE}`, {(hub.root / REPO / HUB_FILE).stat().st_size:,} bytes"
    assert f'refold.from_pretrained("hf-hub:{REPO}")' in text
    assert "Certificate" not in text


def test_the_card_of_an_unnamed_backbone_says_how_to_load_all_the_same(hub: Hub):
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(4, 4), nn.Linear(4, CLASSES)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.body(x))

    refold.push_to_hub(refold.attach(Own(), refold.LoRA(rank=1), example=torch.ones(1, 4)), REPO)
    metadata, text = hub.card()
    assert metadata["tags"] == ["refold", "adapter", "lora", "vision"]
    assert not {"base_model", "datasets", "metrics", "license", "pipeline_tag"} & metadata.keys()
    assert f'refold.load(model, "hf-hub:{REPO}")' in text
    assert "Own" in text
    assert "## Metrics" not in text


def test_a_merged_model_brings_its_certificate(hub: Hub):
    model = trained()
    refold.merge(model)
    weights = {n: v.clone() for n, v in model.state_dict().items()}
    refold.push_to_hub(model, REPO)
    assert all(torch.equal(v, weights[n]) for n, v in model.state_dict().items())
    assert hub.files() == {HUB_FILE, "README.md", "certificate.json"}
    certificate = json.loads((hub.root / REPO / "certificate.json").read_text())
    assert certificate["holds"]
    assert certificate["folded_layers"] == 4
    _, text = hub.card()
    assert "**holds**" in text
    assert f"| float64 | {certificate['dtypes']['float64']['rel_l2']:.1e} |" in text
    refold.unmerge(model)
    x = images(model)
    assert torch.equal(refold.load(build("vit"), f"hf-hub:{REPO}")(x), model(x))


def test_any_adapter_can_be_pushed_and_a_sum_says_so(hub: Hub):
    model = trained()
    refold.attach(model, refold.RepAdapter(rank=2), name="other")
    perturb(refold.trainable_parameters(model))
    refold.combine(model, {"default": 0.25, "other": 0.75}, name="sum", head="other")
    refold.push_to_hub(model, REPO)
    _, text = hub.card()
    assert "| Sum of | 0.25 x default + 0.75 x other |" in text
    refold.push_to_hub(model, REPO, name="other")
    _, text = hub.card()
    assert "Sum of" not in text
    assert "| `rank` | 2 |" in text


# -- what goes wrong -------------------------------------------------------------------------------------------


class Response:
    def __init__(self, status: int) -> None:
        self.status_code = status


class Denied(Exception):
    def __init__(self, status: int) -> None:
        super().__init__("denied")
        self.response = Response(status)


FAILURES = [
    (OfflineModeIsEnabled("offline"), "Check the name and the network"),
    (TimeoutError("too slow"), "Check the name and the network"),
    (RuntimeError("a transport's own"), "Check the name and the network"),
    (ValueError("repo id must be"), "Check the name and the network"),
    (Denied(500), "Check the name and the network"),
    (Denied(401), "Log in with `hf auth login`"),
    (Denied(403), "Log in with `hf auth login`"),
    (LocalTokenNotFoundError("no token"), "Log in with `hf auth login`"),
]


@pytest.mark.parametrize("step", ["create_repo", "upload_folder"])
@pytest.mark.parametrize(("failure", "remedy"), FAILURES, ids=lambda value: type(value).__name__)
def test_a_failing_upload_is_one_clear_error(hub, monkeypatch, step, failure, remedy):
    def fail(*args: object, **options: object) -> None:
        raise failure

    monkeypatch.setattr(huggingface_hub, step, fail)
    model = trained()
    with pytest.raises(refold.StoreError, match=rf"{REPO}: the upload failed.*{remedy}.*refold.save"):
        refold.push_to_hub(model, REPO)


@pytest.mark.parametrize(("failure", "remedy"), FAILURES, ids=lambda value: type(value).__name__)
def test_a_failing_download_is_one_clear_error(monkeypatch, failure, remedy):
    def fail(*args: object, **options: object) -> None:
        raise failure

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    with pytest.raises(refold.StoreError, match=rf"hf-hub:{REPO}: cannot be downloaded.*{remedy}.*pass its path"):
        refold.load(build("vit"), f"hf-hub:{REPO}")
    with pytest.raises(refold.StoreError, match="cannot be downloaded"):
        refold.from_pretrained(f"hf-hub:{REPO}")


def test_a_repository_without_an_adapter_is_refused(hub: Hub):
    (hub.root / REPO).mkdir(parents=True)
    with pytest.raises(refold.StoreError, match="cannot be read"):
        refold.load(build("vit"), f"hf-hub:{REPO}")


def test_what_cannot_be_saved_is_not_pushed(hub: Hub):
    with pytest.raises(refold.SiteError, match="no adapter is attached"):
        refold.push_to_hub(build("vit"), REPO)
    final = trained()
    refold.merge(final, keep_base=False)
    with pytest.raises(refold.StoreError, match="merged without its base weights"):
        refold.push_to_hub(final, REPO)
    with pytest.raises(refold.SiteError, match="no adapter named"):
        refold.push_to_hub(trained(), REPO, name="nobody")
    assert not hub.calls
