"""E3VA against its formula on every layout, its counts, what it reads out and where it is refused."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn

import refold
from carriers import attached, gradients, numbers
from highways import SWIN, encoder, pictures
from reference.conv_side import gelu, linear
from reference.ladders import layer_norm
from refold.adapters.highway import Joint, ReadOut
from refold.hosting import hosted
from zoo import build, images, perturb, relative


def junction(x: np.ndarray, n: dict[str, np.ndarray]) -> np.ndarray:
    """U1 U2 GELU(D1 D2 z + p) + q."""
    hidden = gelu(x @ n["down.0.weight"].T @ n["down.1.weight"].T + n["down.1.bias"])
    return linear(hidden @ n["up.0.weight"].T, n["up.1.weight"], n["up.1.bias"])


def rows(x: Tensor) -> np.ndarray:
    """Channels-last features as (B, N, C)."""
    return x.detach().numpy().reshape(x.shape[0], -1, x.shape[-1])


def branches_by_hand(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """What each drop-path module and each stage of a plain backbone returns."""
    seen: dict[str, Tensor] = {}
    hooks = [
        module.register_forward_hook(lambda m, args, output, path=path: seen.__setitem__(path, output))
        for path, module in model.named_modules()
    ]
    with torch.no_grad():
        seen["images"] = x
        model(x)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("start", ["zero", "stem"])
@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("tap", ["branch", "stream"])
def test_swin_follows_the_formula(start, skip, tap):
    model, x = encoder("swin"), pictures()
    plain = copy.deepcopy(model)
    seen = branches_by_hand(plain, x)
    attached(model, refold.E3VA(rank=3, start=start, skip=skip, tap=tap))
    with torch.no_grad():
        found = model(x)
    slots = hosted(model)

    h = rows(seen["patch_embed"]) if start == "stem" else 0.0
    for stage, depth in enumerate(SWIN["depths"]):
        if stage:
            width, side = h.shape[-1], round(h.shape[1] ** 0.5)
            with torch.no_grad():
                h = rows(
                    plain.get_submodule(f"layers_{stage}.downsample")(torch.tensor(h.reshape(2, side, side, width)))
                )
        stream = rows(seen["patch_embed"] if not stage else seen[f"layers_{stage}.downsample"])
        for block in range(depth):
            for number in (1, 2):
                path = f"layers_{stage}.blocks.{block}.drop_path{number}"
                z = rows(seen[path])
                stream = stream + z
                h = h + junction(z if tap == "branch" else stream, numbers(slots[path]["default@tap"]))
        last = f"layers_{stage}.blocks.{depth - 1}"
        norm = numbers(slots[last]["default@read"])
        y = rows(seen[last])
        expected = layer_norm(h + y if skip else h, norm["norm.weight"], norm["norm.bias"])
        assert found[stage].shape == seen[last].shape
        np.testing.assert_allclose(rows(found[stage]), expected, rtol=1e-9, atol=1e-9)


def test_maps_with_channels_first_follow_the_formula():
    """ConvNeXt: one tap a block, and two modules between stages, a norm and a convolution."""
    model, x = encoder("test_convnext"), pictures(64)
    plain = copy.deepcopy(model)
    seen = branches_by_hand(plain, x)
    attached(model, refold.E3VA(rank=3))
    with torch.no_grad():
        found = model(x)
    slots, h = hosted(model), None
    for stage, output in enumerate(found):
        if stage:
            with torch.no_grad():
                h = plain.get_submodule(f"stages_{stage}.downsample")(h)
        names = [name for name, _ in plain.get_submodule(f"stages_{stage}.blocks").named_children()]
        for name in names:
            path = f"stages_{stage}.blocks.{name}.drop_path"
            added = junction(rows(seen[path].permute(0, 2, 3, 1)), numbers(slots[path]["default@tap"]))
            side, width = seen[path].shape[-1], seen[path].shape[1]
            added = torch.tensor(added.reshape(2, side, side, width)).permute(0, 3, 1, 2)
            h = added if h is None else h + added
        last = f"stages_{stage}.blocks.{names[-1]}"
        norm = numbers(slots[last]["default@read"])
        expected = layer_norm(rows((h + seen[last]).permute(0, 2, 3, 1)), norm["norm.weight"], norm["norm.bias"])
        np.testing.assert_allclose(rows(output.permute(0, 2, 3, 1)), expected, rtol=1e-9, atol=1e-9)


def test_a_plain_vit_is_read_out_where_the_encoder_reads_it():
    """The class token passes along with the patches; blocks behind the last one that is read have no tap."""
    model, x = timm.create_model("test_vit", features_only=True, out_indices=(1, 3)).double().eval(), pictures(160)
    seen = branches_by_hand(copy.deepcopy(model), x)
    attached(model, refold.E3VA(rank=3))
    with torch.no_grad():
        found = model(x)
    slots, h, at = hosted(model), 0.0, 0
    assert max(path for path in slots if "drop_path2" in path) == "model.blocks.3.drop_path2"
    for block in range(4):
        for number in (1, 2):
            path = f"model.blocks.{block}.drop_path{number}"
            h = h + junction(rows(seen[path]), numbers(slots[path]["default@tap"]))
        if block in (1, 3):
            norm = numbers(slots[f"model.blocks.{block}"]["default@read"])
            features = h + rows(seen[f"model.blocks.{block}"])
            expected = layer_norm(features, norm["norm.weight"], norm["norm.bias"])[:, 1:]
            np.testing.assert_allclose(rows(found[at].permute(0, 2, 3, 1)), expected, rtol=1e-9, atol=1e-9)
            at += 1


@pytest.mark.parametrize(
    ("name", "width", "depths", "expected"),
    [
        ("swin_base_patch4_window7_224", 128, (2, 2, 18, 2), 1_195_008),
        ("swin_large_patch4_window7_224", 192, (2, 2, 18, 2), 1_792_512),
    ],
)
def test_the_counts_are_the_papers(name, width, depths, expected):
    """49.5 C an adapter, two a block, and a LayerNorm for each of the four maps: 1.20M and 1.79M printed."""
    with torch.device("meta"):
        model = timm.create_model(name, features_only=True, img_size=56)
    model = model.to_empty(device="cpu").eval()
    for tensor in (*model.parameters(), *model.buffers()):
        nn.init.zeros_(tensor)
    refold.attach(model, refold.E3VA())
    widths = [width << stage for stage in range(4)]
    formula = sum(int(2 * d * 49.5 * c) + 2 * c for c, d in zip(widths, depths, strict=True))
    assert formula == expected
    assert sum(p.numel() for p in refold.trainable_parameters(model).values()) == expected


@pytest.mark.parametrize("name", ["swin", "test_convnext", "test_vit"])
def test_detach_brings_the_encoder_back_bit_for_bit(name):
    model, x = encoder(name), pictures(160 if name == "test_vit" else 32)
    keys = list(model.state_dict())
    with torch.no_grad():
        expected = model(x)
        attached(model, refold.E3VA(rank=2))
        changed = model(x)
        assert all(relative(a, b) > 1e-3 for a, b in zip(changed, expected, strict=True))
        with refold.disabled(model):
            assert all(map(torch.equal, model(x), expected))
        assert all(map(torch.equal, model(x), changed))
        refold.detach(model)
        assert all(map(torch.equal, model(x), expected))
    assert list(model.state_dict()) == keys


def test_a_classifier_reads_its_last_block_out():
    model = attached(build("swin"), refold.E3VA(rank=2))
    read = [module for module in model.modules() if isinstance(module, ReadOut)]
    assert len(read) == 1
    assert sum(isinstance(module, Joint) for module in model.modules()) == 1
    x = images(model)
    refold.attach(model, refold.LoRA(rank=2), name="other")
    refold.activate(model, "default")
    assert gradients(model, model(x)).keys() == refold.trainable_parameters(model).keys()


@pytest.mark.parametrize("start", ["zero", "stem"])
def test_it_goes_with_a_method_inside_the_backbone(start):
    """The highway reads the adapted backbone, which then records a graph up to what it reads."""
    model, x = encoder("swin"), pictures()
    highway, inside = refold.E3VA(rank=2, start=start), refold.LoRA(rank=2)
    attached(model, refold.Compose([inside, highway]))
    found = model(x)
    assert gradients(model, *found).keys() == refold.trainable_parameters(model).keys()
    found = [y.detach() for y in found]
    adapted = encoder("swin")
    refold.attach(adapted, inside)
    state = model.state_dict()
    for name, parameter in refold.trainable_parameters(adapted).items():
        parameter.data.copy_(state[name])
    refold.merge(adapted)
    alone = attached(encoder("swin"), highway)
    alone.load_state_dict({**alone.state_dict(), **adapted.state_dict()})
    for name, parameter in refold.trainable_parameters(alone).items():
        parameter.data.copy_(state[name.replace("@tap", "@tap@1").replace("@read", "@read@1")])
    for ours, theirs in zip(found, alone(x), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_a_file_carries_it(tmp_path):
    model, x = encoder("swin"), pictures()
    attached(model, refold.E3VA(rank=2))
    path = refold.save(model, tmp_path / "highway.safetensors")
    other = refold.load(encoder("swin"), path)
    assert all(map(torch.equal, other(x), model(x)))


def test_images_of_another_size_go_through():
    model = timm.create_model("test_convnext", features_only=True)
    refold.attach(model, refold.E3VA(rank=2))
    perturb(refold.trainable_parameters(model))
    assert [tuple(y.shape[-2:]) for y in model(torch.randn(1, 3, 96, 64))] == [(24, 16), (12, 8), (6, 4), (3, 2)]


def test_a_backbone_that_changes_shape_inside_a_block_is_refused():
    model = timm.create_model("test_resnet", features_only=True)
    keys = list(model.state_dict())
    with pytest.raises(refold.SiteError, match=r"no module alone turns the features of .* Choose a method"):
        refold.attach(model, refold.E3VA())
    assert list(model.state_dict()) == keys


class Leaky(nn.Module):
    """Its second block reads the first one's result both through a module and by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(4, 4)
        self.one, self.two, self.three = Residual(), Residual(), Residual()

    def forward(self, x: Tensor) -> list[Tensor]:
        first = self.one(self.stem(x))
        second = self.two(first) + first * 0.5
        return [first, self.three(second)]


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(x)


def test_a_backbone_that_would_go_on_from_what_is_read_out_is_refused():
    model = Leaky()
    with pytest.raises(refold.SiteError, match=r"one: .*the backbone goes on from what is read out here"):
        refold.attach(model, refold.E3VA(rank=1), example=torch.randn(2, 3, 4), trainable=())
    assert not hosted(model)


def test_gradient_checkpoints_are_refused():
    model = attached(build("timm_test_vit4"), refold.E3VA(rank=2))
    model.set_grad_checkpointing(True)
    with pytest.raises(refold.SiteError, match="gradient checkpoint"):
        model(images(model)).sum().backward()


def test_merging_is_refused_and_settings_are_checked():
    with pytest.raises(refold.MergeError):
        refold.merge(refold.attach(build("vit"), refold.E3VA()))
    for wrong in ({"rank": 0}, {"reduction": 0}, {"start": "one"}, {"tap": "x"}, {"skip": 1}, {"recompute": True}):
        with pytest.raises(refold.SiteError, match=f"{next(iter(wrong))}="):
            refold.E3VA(**wrong)
