"""Conv-Adapter against its formula in all four placements."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

import refold
from reference import conv_side
from refold.hosting import hosted
from zoo import build, images, perturb, relative

POSITIONS = ("conv_parallel", "conv_sequential", "residual_parallel", "residual_sequential")


def relu(x: np.ndarray) -> np.ndarray:
    return np.maximum(x, 0)


def numbers(model: nn.Module) -> dict[str, dict[str, np.ndarray]]:
    slots = {path: slot["default"] for path, slot in hosted(model).items()}
    return {p: {n: v.detach().double().numpy().copy() for n, v in a.state_dict().items()} for p, a in slots.items()}


def attached(model: nn.Module, method: refold.Method, **options: object) -> nn.Module:
    refold.attach(model.double().eval(), method, **options)
    perturb(refold.trainable_parameters(model), 0.2)
    return model


def seen_by(model: nn.Module, path: str, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What a module is given and what it returns, adapters included."""
    found: list[torch.Tensor] = []
    handle = model.get_submodule(path).register_forward_hook(lambda m, args, output: found.extend((args[0], output)))
    model(x)
    handle.remove()
    return found[0].detach(), found[1].detach()


class Block(nn.Module):
    """A basic block of ResNet, small enough for loops; ``stride`` 2 projects its shortcut."""

    def __init__(self, inside: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inside, out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.project = nn.Conv2d(inside, out, 1, stride) if stride > 1 else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + self.project(x))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 2, 1)
        self.layer1 = nn.Sequential(Block(8, 8, 1), Block(8, 8, 1))
        self.layer2 = nn.Sequential(Block(8, 16, 2), Block(16, 16, 1))
        self.fc = nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.layer2(self.layer1(self.stem(x))).mean((2, 3)))


EXAMPLE = torch.randn(1, 3, 32, 32, dtype=torch.float64)
#: Another size than at attach, with odd and oblong maps.
IMAGES = torch.randn(2, 3, 18, 28, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


# -- the formula ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("path", ["layer1.0", "layer2.0"])
def test_the_four_placements_are_the_formula(position, path):
    """In blocks that keep their input's shape and in those that do not."""
    torch.manual_seed(0)
    model = attached(Net(), refold.ConvAdapter(position=position), example=EXAMPLE)
    host = f"{path}.conv1" if position.startswith("conv") else path
    values = numbers(model)[host]
    given, adapted = seen_by(model, host, IMAGES)
    blocks = [f"layer{i}.{j}" for i in (1, 2) for j in (0, 1)]
    convolutions = [f"{block}.conv{i}" for block in blocks for i in (1, 2)]
    assert sorted(numbers(model)) == (convolutions if position.startswith("conv") else blocks)
    refold.detach(model)
    plain = model.get_submodule(host)(given).detach()
    stride = 2 if path == "layer2.0" and position.endswith("parallel") else 1
    read = given if position.endswith("parallel") else plain
    added = conv_side.conv_adapter(read.numpy(), values, relu, stride=stride, pads=(1, 1))
    assert relative(adapted, plain + torch.from_numpy(added)) < 1e-12


def test_convnext_has_them_beside_its_depthwise_and_its_down_sampling_convolutions():
    model = attached(build("convnext"), refold.ConvAdapter(activation="gelu"))
    values = numbers(model)
    blocks, between = range(4), range(1, 4)
    expected = {f"stages.{i}.blocks.0.conv_dw" for i in blocks} | {f"stages.{i}.downsample.1" for i in between}
    assert set(values) == expected
    for host, stride, pads in (("stages.2.blocks.0.conv_dw", 1, (3, 3)), ("stages.3.downsample.1", 2, (0, 0))):
        given, adapted = seen_by(model, host, images(model))
        with refold.disabled(model):
            plain = model.get_submodule(host)(given).detach()
        added = conv_side.conv_adapter(given.numpy(), values[host], conv_side.gelu, stride=stride, pads=pads)
        assert relative(adapted, plain + torch.from_numpy(added)) < 1e-12


def test_swin_has_them_beside_its_attention():
    """As in the released code: on the norm's output as a whole map, with a kernel of the window's size."""
    model = attached(build("swin"), refold.ConvAdapter(position="residual_parallel", sites="attention"))
    values, block = numbers(model), model.layers[1].blocks[1]
    assert values["layers.1.blocks.1.drop_path1"]["down.weight"].shape == (8, 4, 7, 7)
    given, adapted = seen_by(model, "layers.1.blocks.1", images(model))
    refold.detach(model)
    with torch.no_grad():
        normed = block.norm1(given)
        maps = normed.permute(0, 3, 1, 2).numpy()
        added = conv_side.conv_adapter(maps, values["layers.1.blocks.1.drop_path1"], relu)
        stream = given + block._attn(normed) + torch.from_numpy(added).permute(0, 2, 3, 1)
        stream = stream + block.mlp(block.norm2(stream))
    assert relative(adapted, stream) < 1e-12


@pytest.mark.parametrize("position", ["residual_parallel", "residual_sequential"])
@pytest.mark.parametrize("sites", [None, "mlp"])
def test_tokens_are_maps_and_class_tokens_images_of_one_pixel(position, sites):
    model = attached(build("vit_with_registers"), refold.ConvAdapter(position=position, sites=sites))
    values, block = numbers(model), model.blocks[1]
    given, adapted = seen_by(model, "blocks.1", images(model))
    refold.detach(model)

    def added(tokens: torch.Tensor, host: str) -> torch.Tensor:
        patches = tokens[:, 5:].transpose(1, 2).reshape(len(tokens), -1, 2, 2)
        pieces = [tokens[:, i, :, None, None] for i in range(5)] + [patches]
        found = [torch.from_numpy(conv_side.conv_adapter(p.numpy(), values[host], relu)) for p in pieces]
        return torch.cat([f.flatten(2).transpose(1, 2) for f in found], dim=1)

    with torch.no_grad():
        middle = given + block.attn(block.norm1(given))
        plain = middle + block.mlp(block.norm2(middle))
        normed = block.norm2(middle)
        parallel = position == "residual_parallel"
        if sites is None:
            expected = plain + added(given if parallel else plain, "blocks.1")
        else:
            expected = plain + added(normed if parallel else plain, "blocks.1.drop_path2")
    assert relative(adapted, expected) < 1e-12


# -- counts and the start ---------------------------------------------------------------------------------------


def size_of(name: str, position: str) -> int:
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=0)
    model = model.to_empty(device="cpu")
    with torch.no_grad():
        for value in (*model.parameters(), *model.buffers()):
            value.zero_()
    refold.attach(model, refold.ConvAdapter(position=position), example=torch.zeros(1, 3, 64, 64))
    return refold.explain(model).trainable


def test_parameters_on_resnet50():
    blocks = ((64, 3), (128, 4), (256, 6), (512, 3))  # width of the 3 x 3 convolutions, and blocks
    expected = sum(n * conv_side.conv_adapter_size(w, w, 3, 4) for w, n in blocks)
    assert size_of("resnet50", "conv_parallel") == expected == 356_848
    ends = [(64, 256), *[(256, 256)] * 2]
    for stage, count in ((512, 4), (1024, 6), (2048, 3)):
        ends += [(stage // 2, stage), *[(stage, stage)] * (count - 1)]
    expected = sum(conv_side.conv_adapter_size(d, e, 3, 4) for d, e in ends)
    assert size_of("resnet50", "residual_parallel") == expected == 4_481_040


def test_parameters_on_convnext_base():
    widths, blocks = (128, 256, 512, 1024), (3, 3, 27, 3)
    inside = sum(n * conv_side.conv_adapter_size(w, w, 7, 4) for w, n in zip(widths, blocks, strict=True))
    between = sum(conv_side.conv_adapter_size(d, e, 2, 4) for d, e in pairwise(widths))
    assert size_of("convnext_base", "conv_parallel") == inside + between == 3_721_728


def test_parameters_on_efficientnet_b0():
    # Kernel, width of the block's input and output, and how often it is repeated; the first has another class.
    stages = ((3, 16, 24, 2), (5, 24, 40, 2), (3, 40, 80, 3), (5, 80, 112, 3), (5, 112, 192, 4), (3, 192, 320, 1))
    depthwise, beside = conv_side.conv_adapter_size(32, 32, 3, 4), 0
    for kernel, inside, out, count in stages:
        for width in (inside, *[out] * (count - 1)):
            depthwise += conv_side.conv_adapter_size(6 * width, 6 * width, kernel, 4)
            beside += conv_side.conv_adapter_size(width, out, kernel, 4)
    assert size_of("efficientnet_b0", "conv_parallel") == depthwise == 2_082_496
    assert size_of("efficientnet_b0", "residual_parallel") == beside == 96_020


@pytest.mark.parametrize("activation", ["relu", "identity"])
def test_the_start_is_the_published_one(activation):
    """Not the backbone: small weights, zero biases and a scale of one."""
    torch.manual_seed(0)
    model = build("resnet")
    x = images(model)
    before = model(x)
    refold.attach(model, refold.ConvAdapter(activation=activation))
    values = numbers(model)
    assert all((v["gamma"] == 1).all() for v in values.values())
    assert not any(v[n].any() for v in values.values() for n in v if n.endswith("bias"))
    weights = np.concatenate([v[n].ravel() for v in values.values() for n in v if n.startswith(("down", "up"))])
    weights = weights[weights != 0]
    assert abs(weights.std() / 0.02 - 1) < 0.05
    assert 0 < relative(model(x), before) < 0.1


def test_reductions_that_do_not_divide_a_width_are_told():
    model = attached(Net(), refold.ConvAdapter(reduction=3), example=EXAMPLE)
    told = refold.explain(model).rows[0]
    assert told.reason.endswith("filters of 4 instead of 3 channels, which do not divide 8")
    whole = attached(Net(), refold.ConvAdapter(reduction=64), example=EXAMPLE)
    assert numbers(whole)["layer1.0.conv1"]["down.weight"].shape == (1, 8, 3, 3)


# -- what surrounds it ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("position", POSITIONS)
def test_every_part_trains_also_under_checkpointing(position):
    model = refold.attach(build("resnet"), refold.ConvAdapter(position=position)).train()
    x, found = torch.randn(2, 3, 64, 64), []
    for checkpointing in (False, True):
        model.set_grad_checkpointing(checkpointing)
        model.zero_grad()
        model(x).square().sum().backward()
        found.append({n: p.grad.clone() for n, p in refold.trainable_parameters(model).items() if p.grad is not None})
    assert found[0].keys() == refold.trainable_parameters(model).keys()
    assert all(bool(g.any()) for g in found[0].values())
    assert all(torch.allclose(g, found[1][n], rtol=1e-4, atol=1e-6) for n, g in found[0].items())


@pytest.mark.parametrize("position", POSITIONS)
def test_low_precision_export_and_files(position, tmp_path):
    model, method = build("resnet"), refold.ConvAdapter(position=position)
    plain = {n: v.clone() for n, v in model.state_dict().items()}
    refold.attach(model, method)
    perturb(refold.trainable_parameters(model))
    x = torch.randn(2, 3, 64, 96)
    exact = model(x).detach()
    with torch.autocast("cpu", torch.bfloat16):
        assert relative(model(x), exact) < 3e-2
    if position.endswith("parallel"):
        assert relative(torch.export.export(model, (x,)).module()(x), exact) < 1e-6
    path = refold.save(model, tmp_path / "a.safetensors")
    refold.detach(model)
    assert model.state_dict().keys() == plain.keys()
    assert all(torch.equal(model.state_dict()[n], v) for n, v in plain.items())
    assert torch.equal(refold.load(model, path)(x), exact)
    low = refold.attach(build("resnet", torch.bfloat16), method)
    assert low(x.bfloat16()).dtype == torch.bfloat16


def test_backbones_without_a_place_for_it_are_refused():
    with pytest.raises(refold.SiteError, match=r"no convolution over several positions.*residual_parallel"):
        refold.attach(build("vit"), refold.ConvAdapter())
    with pytest.raises(refold.SiteError, match="no residual blocks"):
        refold.attach(build("efficientnet"), refold.ConvAdapter(position="residual_parallel"))
    with pytest.raises(refold.SiteError, match=r"layer9: no block has this path. Blocks are layer1.0"):
        refold.attach(Net(), refold.ConvAdapter(position="residual_parallel", sites="layer9"), example=EXAMPLE.float())
    with pytest.raises(refold.SiteError, match="fc1: it is no convolution over rows and columns"):
        refold.attach(build("vit"), refold.ConvAdapter(sites="*.fc1"))


@pytest.mark.parametrize(("sites", "hosts"), [("layer2", ["layer2.0", "layer2.1"]), ("*.1", ["layer1.1", "layer2.1"])])
def test_blocks_are_chosen_by_path(sites, hosts):
    method = refold.ConvAdapter(position="residual_sequential", sites=sites)
    assert list(numbers(attached(Net(), method, example=EXAMPLE))) == hosts


@pytest.mark.parametrize("options", [{"reduction": 0}, {"activation": "x"}, {"position": "parallel"}, {"sites": ()}])
def test_wrong_hyper_parameters_are_refused(options):
    with pytest.raises(refold.SiteError, match=f"{next(iter(options))}="):
        refold.ConvAdapter(**options)
