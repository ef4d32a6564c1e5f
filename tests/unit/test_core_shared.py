"""Separate projections for query, key and value share one adapter, as the papers put one before the attention."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import refold
from refold.hosting import hosted
from zoo import perturb, relative

METHOD = refold.RepAdapter(rank=4, dropout=0.0)


@pytest.fixture
def vit() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        image_size=32,
        patch_size=16,
        num_labels=3,
    )
    torch.manual_seed(0)
    return transformers.ViTForImageClassification(config).double().eval()


@pytest.fixture
def images() -> Tensor:
    return torch.randn(2, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def projections(model: nn.Module) -> list[list[str]]:
    """Paths of query, key and value, block by block."""
    rows = [row.path for row in refold.explain(model).rows if row.role == "attention"]
    return [rows[:3], rows[3:]]


def test_one_adapter_serves_the_three_projections_of_a_block(vit, images):
    refold.attach(vit, METHOD)
    one = 4 * 32 + 32 * 4 // 2 + 4 + 32
    assert refold.explain(vit).adapter_parameters == 2 * 2 * one
    assert refold.explain(vit).adapter_parameters + 32 * 3 + 3 == refold.explain(vit).trainable
    slots = hosted(vit)
    blocks = projections(vit)
    assert [len(paths) for paths in blocks] == [3, 3]
    for paths in blocks:
        assert len({id(slots[path]["default"]) for path in paths}) == 1
    assert slots[blocks[0][0]]["default"] is not slots[blocks[1][0]]["default"]
    told = {row.path: row.reason for row in refold.explain(vit).rows}
    assert f"shares the adapter of {blocks[0][0]}" in told[blocks[0][1]]


def test_it_computes_what_an_adapter_before_the_attention_computes(vit, images):
    """Against the same model with the attention's input mapped by hand, in float64."""
    twin = copy.deepcopy(vit)
    refold.attach(vit, METHOD)
    perturb(refold.trainable_parameters(vit))
    slots, trained = hosted(vit), dict(vit.named_parameters())
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            parameter.copy_(trained[name])

    def mapped(adapter: nn.Module):
        down, up = adapter.down.detach(), torch.block_diag(*adapter.up.detach().chunk(2))

        def before(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            x = args[0]
            return (x + (x @ down.T + adapter.down_bias) @ up.T + adapter.up_bias, *args[1:])

        return before

    for paths in projections(vit):
        parent = twin.get_submodule(paths[0].rpartition(".")[0])
        parent.register_forward_pre_hook(mapped(slots[paths[0]]["default"]))
    for row in refold.explain(vit).rows:
        if row.role == "mlp":
            twin.get_submodule(row.path).register_forward_pre_hook(mapped(slots[row.path]["default"]))
    with torch.no_grad():
        assert relative(vit(images).logits, twin(images).logits) < 1e-12


def test_it_merges_comes_back_and_is_stored_once(vit, images, tmp_path: Path):
    plain = copy.deepcopy(vit)
    refold.attach(vit, METHOD)
    perturb(refold.trainable_parameters(vit))
    output = vit(images).logits.detach()
    path = refold.save(vit, tmp_path / "adapter.safetensors")
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        stored = [key for key in file.keys() if key.startswith("adapter/")]  # noqa: SIM118 (not a dict)
    assert len(stored) == 2 * 2 * 4
    other = refold.load(copy.deepcopy(plain), path)
    assert torch.equal(other(images).logits, output)
    copied = copy.deepcopy(vit)
    slots = hosted(copied)
    assert len({id(slots[p]["default"]) for p in projections(copied)[0]}) == 1

    refold.merge(vit)
    assert relative(vit(images).logits, output) < 1e-10
    refold.unmerge(vit)
    assert torch.equal(vit(images).logits, output)
    slots = hosted(vit)
    assert len({id(slots[p]["default"]) for p in projections(vit)[0]}) == 1
    refold.detach(vit)
    assert all(torch.equal(v, plain.state_dict()[n]) for n, v in vit.state_dict().items())


def test_two_projections_of_one_gated_mlp_share_one_adapter():
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate_proj, self.up_proj = nn.Linear(8, 16), nn.Linear(8, 16)
            self.down_proj = nn.Linear(16, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.down_proj(torch.sigmoid(self.gate_proj(x)) * self.up_proj(x))

    model = nn.ModuleDict({"mlp": Gated(), "head": nn.Linear(8, 2)})
    model.forward = lambda x: model["head"](model["mlp"](x))  # type: ignore[method-assign]
    x = torch.randn(3, 8)
    refold.attach(model, refold.RepAdapter(rank=4, sites="mlp"), example=x)
    slots = hosted(model)
    assert set(slots) == {"mlp.gate_proj", "mlp.up_proj"}
    assert slots["mlp.gate_proj"]["default"] is slots["mlp.up_proj"]["default"]
    refold.detach(model)
    assert slots["mlp.gate_proj"] is not None
    refold.attach(model, refold.LoRA(rank=4, sites="mlp"), example=x)
    slots = hosted(model)
    assert slots["mlp.gate_proj"]["default"] is not slots["mlp.up_proj"]["default"]
