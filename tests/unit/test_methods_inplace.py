"""Methods that train the backbone's own parameters: exactly those the papers name, and nothing else."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

import refold
from refold.attachment import head_paths
from zoo import build, images


def trained(model: nn.Module, method: refold.Method) -> set[str]:
    """Names of what trains beside the head."""
    heads = tuple(f"{path}." for path in head_paths(model))
    return {n for n in refold.trainable_parameters(refold.attach(model, method)) if not n.startswith(heads)}


def block(index: int, *names: str) -> set[str]:
    return {f"blocks.{index}.{name}" for name in names}


NORMS = ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias")
WHOLE = (*NORMS, *(f"{m}.{p}" for m in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2") for p in ("weight", "bias")))


def test_layer_norm_tuning_trains_every_norm_of_a_vit():
    expected = block(0, *NORMS) | block(1, *NORMS) | {"norm.weight", "norm.bias"}
    assert trained(build("vit"), refold.LayerNormTune()) == expected


def test_norms_of_no_class_of_torch_are_found_by_what_they_do():
    """timm's RmsNorm derives from nn.Module; LayerScale has one number a channel too and is no norm."""
    expected = {f"blocks.{i}.norm{j}.weight" for i in range(2) for j in (1, 2)} | {"fc_norm.weight"}
    model = build("timm_test_vit4")
    assert not isinstance(model.get_submodule("fc_norm"), (nn.LayerNorm, nn.RMSNorm))
    assert any(name.endswith("ls1.gamma") for name, _ in model.named_parameters())
    assert trained(model, refold.LayerNormTune()) == expected


class Gate(nn.Module):
    """A scale for each channel that needs a second tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(8))

    def forward(self, x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        return x * self.weight + other


class Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.gate, self.act = nn.LayerNorm(8), Gate(), nn.PReLU(8)
        self.twice, self.head = timm.layers.RmsNorm(8), nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        x = self.act(self.gate(x, x).movedim(-1, 1)).movedim(1, -1)
        return self.head(self.twice(self.twice(x)).mean(1))


def test_what_cannot_be_told_from_a_norm_is_listed_and_strict_refuses():
    model = refold.attach(Odd(), refold.LayerNormTune(), example=torch.randn(2, 5, 8))
    rows = {row.path: row.reason for row in refold.explain(model).rows if row.slot == "-"}
    assert rows.keys() == {"gate", "twice"}
    assert "cannot be tried" in rows["gate"]
    assert "more than once" in rows["twice"]
    assert {n for n in refold.trainable_parameters(model) if not n.startswith("head")} == {"first.weight", "first.bias"}
    with pytest.raises(refold.SiteError, match="gate: Gate cannot be tried"):
        refold.attach(Odd(), refold.LayerNormTune(), example=torch.randn(2, 5, 8), strict=True)


def test_trying_layers_leaves_no_trace():
    model = build("timm_test_vit4").train()
    before, state = torch.get_rng_state(), {n: v.clone() for n, v in model.state_dict().items()}
    refold.detach(refold.attach(model, refold.LayerNormTune()))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert model.training


def test_of_a_batchnorm_scale_and_bias_train_and_the_statistics_stay():
    model = build("resnet")
    norms = {path for path, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)}
    assert trained(model, refold.LayerNormTune()) == {f"{path}.{leaf}" for path in norms for leaf in ("weight", "bias")}
    before = {n: b.clone() for n, b in model.named_buffers()}
    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.SGD(refold.param_groups(model, lr=0.1))
    model.train()(images(model, 8)).square().sum().backward()
    optimizer.step()
    assert all(torch.equal(b, before[n]) for n, b in model.named_buffers())
    assert all(not torch.equal(model.get_parameter(f"{path}.weight"), weights[f"{path}.weight"]) for path in norms)


def test_a_backbone_without_norms_is_refused():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    with pytest.raises(refold.SiteError, match="no norm with parameters"):
        refold.attach(model, refold.LayerNormTune(), example=torch.randn(1, 4), trainable=("2",))


def test_the_last_block_and_the_final_norm_train():
    last = block(1, *WHOLE) | {"norm.weight", "norm.bias"}
    assert trained(build("vit"), refold.Partial()) == last
    assert trained(build("vit"), refold.Partial(blocks=2)) == last | block(0, *WHOLE)


def test_what_the_last_blocks_share_with_earlier_ones_stays_frozen():
    """An embedding that the model itself adds is before every block, wherever its module stands."""
    expected = {n for n, _ in build("vit_with_registers").named_parameters() if n.startswith(("blocks", "norm"))}
    assert trained(build("vit_with_registers"), refold.Partial(blocks=2)) == expected


def test_a_convolutional_backbone_counts_its_blocks_from_the_end():
    """Also those whose shortcut is a projection: the first of every stage but one."""
    for count, blocks in ((1, ("layer4.1",)), (2, ("layer4",)), (3, ("layer3.1", "layer4"))):
        model = timm.create_model("resnet18", num_classes=2)
        names = {n for n, _ in model.named_parameters() if n.startswith(blocks)}
        assert trained(model, refold.Partial(blocks=count)) == names


@pytest.mark.parametrize("value", [0, -1, 1.0, True, "1"])
def test_blocks_must_be_a_positive_integer(value):
    with pytest.raises(refold.SiteError, match="blocks="):
        refold.Partial(blocks=value)


def test_more_blocks_than_there_are_is_refused():
    with pytest.raises(refold.SiteError, match="blocks=3, and the backbone has 2"):
        refold.attach(build("vit"), refold.Partial(blocks=3))


def test_nothing_below_the_trained_blocks_keeps_activations():
    from refold.bench.measure import stored_bytes

    stored = {}
    for blocks in (1, 2):
        model = refold.attach(build("vit"), refold.Partial(blocks=blocks)).train()
        x = images(model, 4)
        stored[blocks] = stored_bytes(lambda model=model, x=x: model(x).sum(), model).activations
    assert stored[1] < 0.6 * stored[2]
