"""DTL and DTL+ against their formula, on every layout; what they store, and what surrounds them."""

from __future__ import annotations

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn

import refold
from carriers import attached, numbers, watch
from reference import ladders
from refold.bench.measure import stored_bytes
from refold.hosting import hosted
from zoo import build, images, perturb, relative

BETA = 20.0


def adapters(model: nn.Module) -> dict[str, nn.Module]:
    return {path: slot["default"] for path, slot in hosted(model).items()}


def vit(**options: object) -> nn.Module:
    """Four blocks, a class token and two registers."""
    return timm.create_model("test_vit", img_size=48, num_classes=3, reg_tokens=2, depth=4, **options)


@pytest.mark.parametrize("plus", [False, True])
@pytest.mark.parametrize("start", [None, 1, 2])
def test_a_vit_is_the_formula(plus, start):
    model = attached(vit(), refold.DTL(beta=BETA, start=start, plus=plus))
    found = {path: numbers(adapter) for path, adapter in adapters(model).items()}
    assert list(found) == [f"blocks.{i}" for i in range(4)]
    kernels = [part["conv.weight"] for part in found.values() if "conv.weight" in part]
    assert len(kernels) == plus  # one for all
    x = torch.randn(2, 3, 48, 48, dtype=torch.float64)
    stream, adapted = watch(model, "blocks.0", "blocks.3", x)
    refold.detach(model).requires_grad_(False)
    state: np.ndarray | float = 0.0
    for number, block in enumerate(model.blocks, start=1):
        kernel = kernels[0] if plus else None
        state, added = ladders.dtl(state, stream.numpy(), found[f"blocks.{number - 1}"], BETA, kernel, (3, 3))
        stream = block(stream)
        if number >= (start or 3):
            stream = stream + torch.from_numpy(added)
    assert relative(adapted, stream) < 1e-12


def tokens(maps: Tensor, channels_last: bool) -> np.ndarray:
    return (maps if channels_last else maps.permute(0, 2, 3, 1)).flatten(1, 2).numpy()


@pytest.mark.parametrize("plus", [False, True])
def test_each_stage_of_a_swin_has_a_state_of_its_own(plus):
    model = attached(build("swin"), refold.DTL(beta=BETA, start=1, plus=plus))
    found = {path: numbers(adapter) for path, adapter in adapters(model).items()}
    assert list(found) == ["layers.0.blocks.0", "layers.1.blocks.0", "layers.1.blocks.1"]
    assert [row.role for row in refold.explain(model).rows[:3]] == [
        "stage 1, added",
        "stage 2, added",
        "stage 2, added",
    ]
    assert [len(part) for part in found.values()] == ([3, 3, 2] if plus else [2, 2, 2])
    stream, adapted = watch(model, "layers.0.blocks.0", "layers.1.blocks.1", images(model))
    refold.detach(model).requires_grad_(False)
    for layer, index in zip(model.layers, range(2), strict=True):
        stream = layer.downsample(stream)
        state: np.ndarray | float = 0.0
        kernel = found[f"layers.{index}.blocks.0"].get("conv.weight")
        for number, block in enumerate(layer.blocks):
            grid = tuple(stream.shape[1:3])
            part = found[f"layers.{index}.blocks.{number}"]
            state, added = ladders.dtl(state, tokens(stream, True), part, BETA, kernel, grid)
            stream = block(stream) + torch.from_numpy(added).view(stream.shape)
    assert relative(adapted, stream) < 1e-12


@pytest.mark.parametrize(("start", "wanted"), [(None, ["stages.2", "stages.3"]), (4, ["stages.3"])])
def test_stages_before_the_start_have_none(start, wanted):
    """On ConvNeXt, channels first; the half of its blocks is where the third stage begins."""
    model = attached(build("convnext"), refold.DTL(beta=BETA, start=start, plus=True))
    found = {path: numbers(adapter) for path, adapter in adapters(model).items()}
    assert list(found) == [f"{stage}.blocks.0" for stage in wanted]
    stream, adapted = watch(model, f"{wanted[0]}.blocks.0", "stages.3.blocks.0", images(model))
    refold.detach(model).requires_grad_(False)
    for stage in wanted:
        part, block = found[f"{stage}.blocks.0"], model.get_submodule(f"{stage}.blocks.0")
        stream = stream if stage == wanted[0] else model.get_submodule(f"{stage}.downsample")(stream)
        kernel, grid = part["conv.weight"], tuple(stream.shape[2:])
        _, added = ladders.dtl(0.0, tokens(stream, False), part, BETA, kernel, grid)
        shaped = torch.from_numpy(added).transpose(1, 2).reshape(stream.shape)
        stream = block(stream) + shaped
    assert relative(adapted, stream) < 1e-12


def test_some_blocks_alone_fill_the_state():
    model = attached(vit(), refold.DTL(beta=BETA, sites=("blocks.1", "blocks.3")))
    found = {path: numbers(adapter) for path, adapter in adapters(model).items()}
    assert list(found) == ["blocks.1", "blocks.3"]
    stream, adapted = watch(model, "blocks.0", "blocks.3", torch.randn(2, 3, 48, 48, dtype=torch.float64))
    refold.detach(model).requires_grad_(False)
    stream = model.blocks[0](stream)
    state, _ = ladders.dtl(0.0, stream.numpy(), found["blocks.1"], BETA)
    stream = model.blocks[2](model.blocks[1](stream))
    _, added = ladders.dtl(state, stream.numpy(), found["blocks.3"], BETA)
    assert relative(adapted, model.blocks[3](stream) + torch.from_numpy(added)) < 1e-12


def test_blocks_that_change_the_shape_are_left_out():
    model = refold.attach(build("resnet"), refold.DTL())
    assert list(adapters(model)) == ["layer1.0"]
    left = {row.path: row.reason for row in refold.explain(model).rows if row.slot == "-"}
    assert left == dict.fromkeys(("layer2.0", "layer4.0"), "left out: it changes the shape of its features")


@pytest.mark.parametrize(
    ("family", "method", "reason"),
    [
        ("vit", refold.DTL(start=3), "of its 2 blocks that keep their features' shape none has the number 3"),
        ("efficientnet", refold.DTL(), "the forward has no residual blocks"),
    ],
)
def test_what_has_no_place_is_refused(family, method, reason):
    with pytest.raises(refold.SiteError, match=reason):
        refold.attach(build(family), method)


@pytest.mark.parametrize(
    "settings",
    [{"rank": 0}, {"beta": 0.0}, {"beta": float("nan")}, {"start": 0}, {"start": 1.5}, {"plus": 1}],
)
def test_bad_values_are_refused(settings):
    with pytest.raises(refold.SiteError, match=f"{next(iter(settings))}=.* is not valid"):
        refold.DTL(**settings)


@pytest.mark.parametrize("plus", [False, True])
def test_the_start_is_the_backbone_and_everything_learns(plus):
    model, x = vit(global_pool="avg").train(), torch.randn(4, 3, 48, 48)
    before = model(x).detach()
    refold.attach(model, refold.DTL(plus=plus))
    assert torch.equal(model(x), before)
    first = adapters(model)["blocks.0"]
    bound = (1 / first.down.in_features) ** 0.5  # Kaiming-uniform with a = sqrt(5)
    assert 0.8 * bound < float(first.down.weight.detach().abs().max()) <= bound
    optimizer, reached = torch.optim.SGD(refold.trainable_parameters(model).values(), lr=0.1), set()
    for _ in range(2):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        reached |= {n for n, p in refold.trainable_parameters(model).items() if p.grad is not None and p.grad.any()}
        optimizer.step()
    assert reached == set(refold.trainable_parameters(model))


def stored(method: refold.Method, x: Tensor) -> int:
    model = refold.attach(vit(), method)
    return stored_bytes(lambda: model(x), model).activations


def test_before_the_start_no_graph_is_recorded_and_little_is_stored():
    model, x = refold.attach(vit(), refold.DTL()), torch.randn(8, 3, 48, 48)
    graded = []
    for block in model.blocks:
        block.register_forward_hook(lambda module, args, output: graded.append(output.requires_grad))
    model(x)
    assert graded == [False, False, True, True]
    lora, stream = stored(refold.LoRA(), x), x.shape[0] * 12 * model.embed_dim * x.element_size()
    assert stored(refold.DTL(), x) < 0.5 * lora
    assert stored(refold.DTL(start=4), x) < 0.2 * lora
    assert stored(refold.DTL(start=4), x) < 8 * stream  # of them four enter the maps, of which autograd needs them


@pytest.mark.parametrize("size", [16, 64])
def test_the_convolution_follows_the_images_size(size: int):
    model = attached(vit(dynamic_img_size=True), refold.DTL(beta=BETA, plus=True))
    assert model(torch.randn(1, 3, size, size, dtype=torch.float64)).isfinite().all()


def test_without_a_grid_the_convolution_is_refused():
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True)
            self.head = nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.block(x).mean(1))

    example = torch.randn(1, 5, 8)
    with pytest.raises(refold.SiteError, match="nothing shows how its tokens lie on a grid"):
        refold.attach(Tokens(), refold.DTL(plus=True), example=example)
    model = refold.attach(Tokens(), refold.DTL(), example=example)
    perturb(refold.trainable_parameters(model))
    assert model(example).requires_grad


def on_cpu(name: str, **options: object) -> nn.Module:
    """The real architecture at zero: only shapes matter."""
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=0, **options)
    model = model.to_empty(device="cpu").eval()
    with torch.no_grad():
        for value in (*model.parameters(), *model.buffers()):
            value.zero_()
    return model


def test_the_counts_are_the_papers():
    model = on_cpu("vit_base_patch16_224", img_size=32)
    for method, expected in ((refold.DTL(), 36_864), (refold.DTL(plus=True), 43_776), (refold.DTL(rank=4), 73_728)):
        refold.attach(model, method)
        assert sum(p.numel() for p in refold.trainable_parameters(model).values()) == expected
        assert [row.role for row in refold.explain(model).rows].count("stage 1, added") == 6  # from block 7 on
        refold.detach(model)


def test_the_count_on_swin_b_is_the_released_codes():
    """Rank 4, maps from the fifth block on, the state back from the fifteenth: the printed 0.09M."""
    model = refold.attach(
        on_cpu("swin_base_patch4_window7_224", img_size=64, window_size=2), refold.DTL(rank=4, start=15)
    )
    assert sum(p.numel() for p in refold.trainable_parameters(model).values()) == 2 * 4 * (18 * 512 + 2 * 1024)
    roles = [row.role for row in refold.explain(model).rows]
    assert roles == ["stage 3"] * 10 + ["stage 3, added"] * 8 + ["stage 4, added"] * 2
