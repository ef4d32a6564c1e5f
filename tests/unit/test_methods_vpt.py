"""VPT against its formulas on every kind of position, its start and its counts."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from timm.models.beit import Beit
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer_relpos import VisionTransformerRelPos
from torch import nn

import refold
from prompted import MODELS, array, attached, made, prompts
from reference import prompts as paper
from refold.hosting import hosted
from zoo import images, perturb, relative


def both(layer: nn.Module) -> tuple[np.ndarray, np.ndarray]:
    return array(layer.weight), array(layer.bias)


def timm_block(block: nn.Module) -> paper.Block:
    attention, gains = block.attn, []
    for number in "12":
        gain = getattr(block, f"gamma_{number}", None)
        gain = getattr(getattr(block, f"ls{number}", None), "gamma", None) if gain is None else gain
        gains.append(1.0 if gain is None else array(gain))
    if getattr(attention, "q_bias", None) is not None:
        bias = np.concatenate([array(attention.q_bias), array(attention.k_bias), array(attention.v_bias)])
    else:
        bias = np.zeros(len(attention.qkv.weight)) if attention.qkv.bias is None else array(attention.qkv.bias)
    return paper.Block(
        attention.num_heads, both(block.norm1), (array(attention.qkv.weight), bias), both(attention.proj),
        both(block.norm2), both(block.mlp.fc1), both(block.mlp.fc2), tuple(gains), epsilon=block.norm1.eps,
    )  # fmt: skip


def packed_block(norm1, attention, norm2, fc1, fc2) -> paper.Block:
    """With torch's own attention."""
    qkv = (array(attention.in_proj_weight), array(attention.in_proj_bias))
    return paper.Block(
        attention.num_heads, both(norm1), qkv, both(attention.out_proj), both(norm2), both(fc1), both(fc2),
        epsilon=norm1.eps,
    )  # fmt: skip


def by_table(module: nn.Module) -> np.ndarray:
    """Bias (heads, N, N), number by number."""
    table, index = array(module.relative_position_bias_table), module.relative_position_index
    size = math.isqrt(index.numel())
    index = index.reshape(size, size).tolist()
    return np.array([[table[row] for row in rows] for rows in index]).transpose(2, 0, 1)


def formula(name: str, model: nn.Module, x: torch.Tensor, run: Callable[..., np.ndarray]) -> torch.Tensor:
    """The plain model with ``run(tokens, blocks, at)`` in place of its blocks."""
    tail: Callable[[torch.Tensor], torch.Tensor]
    tables: list[torch.Tensor | None] = [None, None]
    if name == "torchvision":
        tokens = model._process_input(x)
        tokens = torch.cat((model.class_token.expand(len(x), -1, -1), tokens), 1) + model.encoder.pos_embedding
        layers = [(b.ln_1, b.self_attention, b.ln_2, b.mlp[0], b.mlp[3]) for b in model.encoder.layers]
        blocks, at = [packed_block(*layer) for layer in layers], 1
        tail = lambda t: model.heads(model.encoder.ln(t)[:, 0])  # noqa: E731
    elif name == "open_clip":
        tower = model.visual
        patches = tower.conv1(x).flatten(2).transpose(1, 2)
        tokens = torch.cat((tower.class_embedding.expand(len(x), 1, -1), patches), 1) + tower.positional_embedding
        tokens = tower.ln_pre(tokens)
        layers = [(b.ln_1, b.attn, b.ln_2, b.mlp.c_fc, b.mlp.c_proj) for b in tower.transformer.resblocks]
        blocks, at = [packed_block(*layer) for layer in layers], 1
        tail = lambda t: model.head(tower.ln_post(t)[:, 0] @ tower.proj)  # noqa: E731
    else:
        blocks, at = [timm_block(block) for block in model.blocks], getattr(model, "num_prefix_tokens", 0)
        tokens = model.patch_embed(x)
        if isinstance(model, VisionTransformerRelPos):
            if model.cls_token is not None:
                tokens = torch.cat((model.cls_token.expand(len(x), -1, -1), tokens), 1)
        elif isinstance(model, Beit):
            tokens = torch.cat((model.cls_token.expand(len(x), -1, -1), tokens), 1)
            tokens = tokens if model.pos_embed is None else tokens + model.pos_embed
        else:
            tokens = model._pos_embed(tokens)
            tokens, rope = tokens if isinstance(tokens, tuple) else (tokens, None)
            if rope is not None:
                tables = list(rope) if rope.dim() > 2 and len(rope) == len(blocks) else [rope] * len(blocks)
        tail = lambda t: model.forward_head(model.norm(t))  # noqa: E731
        for layer, block, table in zip(model.blocks, blocks, tables, strict=True):
            if table is not None:
                block.half = bool(getattr(layer.attn, "rotate_half", False))
                block.rotation = paper.rotation(array(table), block.heads, block.half)
            if name in ("bias_by_relative_position", "bias_of_all_blocks"):
                block.bias = by_table(layer.attn if name == "bias_by_relative_position" else model.rel_pos_bias)
            elif "from_a_table" in name:
                block.bias = by_table(layer.attn.rel_pos)
            elif "from_an_mlp" in name:
                block.bias = array(layer.attn.rel_pos.get_bias()[0])
    return tail(torch.from_numpy(run(array(tokens), blocks, at)))


def swin_formula(model: nn.Module, x: torch.Tensor, own: list[list[np.ndarray | None]]) -> torch.Tensor:
    maps = model.patch_embed(x)
    for stage, of_blocks in zip(model.layers, own, strict=True):
        maps = stage.downsample(maps)
        blocks = [timm_block(block) for block in stage.blocks]
        for layer, block in zip(stage.blocks, blocks, strict=True):
            block.bias = by_table(layer.attn)
        shifts = [block.shift_size[0] for block in stage.blocks]
        maps = torch.from_numpy(paper.swin_stage(array(maps), blocks, 4, shifts, of_blocks))
    return model.forward_head(model.norm(maps))


SEQUENCES = [name for name in MODELS if name != "windows"]


@pytest.mark.parametrize("name", SEQUENCES)
@pytest.mark.parametrize("form", ["none", "deep", "shallow"])
def test_it_is_the_papers_formula(name, form):
    plain = made(name)
    x = images(plain)
    if form == "none":  # the reference is right about the backbone
        assert relative(formula(name, plain, x, paper.none), plain(x)) < 1e-12
        return
    model = attached(name, refold.VPT(tokens=3, deep=form == "deep"))
    state = {key: value for key, value in model.state_dict().items() if "refold" not in key}
    plain.load_state_dict(state)  # the head was moved
    own = prompts(model)
    assert [p.shape[0] for p in own] == [3, 3]
    if form == "shallow":
        assert own[0] is not own[1]
        assert len({id(slot["default"]) for slot in hosted(model).values()}) == 1
    run = partial(paper.deep, prompts=own) if form == "deep" else partial(paper.shallow, prompts=own[0])
    expected = formula(name, plain, x, run)
    assert relative(model(x), expected) < 1e-12
    assert relative(plain(x), expected) > 1e-3


@pytest.mark.parametrize("deep", [True, False])
def test_swin_has_prompts_in_its_windows(deep):
    """Shifted windows among them; shallow, each image goes on with its own, to the end of the first stage."""
    model = attached("windows", refold.VPT(tokens=3, deep=deep))
    plain = made("windows")
    plain.load_state_dict({key: value for key, value in model.state_dict().items() if "refold" not in key})
    assert [block.shift_size for block in plain.layers[0].blocks] == [(0, 0), (2, 2)]
    x, own = images(plain), prompts(model)
    if deep:
        expected = swin_formula(plain, x, [own[:2], own[2:]])
    else:
        assert len(hosted(model)) == 3  # two attentions and the MLP between them
        nobody = [np.zeros((0, 16))] * 2
        expected = swin_formula(plain, x, [[own[0], None], nobody])
    assert relative(model(x), expected) < 1e-12
    assert relative(model(x[1:]), expected[1:]) < 1e-12
    assert relative(plain(x), expected) > 1e-3


@pytest.mark.parametrize("family", ["vit", "dinov2", "dinov3", "deit", "clip", "beit"])
def test_transformers_backbones_are_the_formula_too(family):
    model, blocks, embedded, tail = transformers_model(family)
    refold.attach(model, refold.VPT(tokens=3), trainable=())
    perturb(refold.trainable_parameters(model), 0.5)
    x, own = images(model), prompts(model)
    with refold.disabled(model), torch.no_grad():
        tokens = embedded(x)
    at = {"deit": 2, "dinov3": 3}.get(family, 1)
    expected = tail(torch.from_numpy(paper.deep(array(tokens), blocks, at, own)))
    with refold.disabled(model):
        plain = model(x).last_hidden_state
    assert relative(model(x).last_hidden_state, expected) < 1e-12
    assert relative(plain, expected) > 1e-3


def transformers_model(family: str):
    """Model, its blocks for the reference, what comes before them, and behind."""
    import transformers as hf

    options = {
        "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
        "image_size": 32, "patch_size": 8,
    }  # fmt: skip
    classes = {
        "vit": (hf.ViTConfig, partial(hf.ViTModel, add_pooling_layer=False)),
        "dinov2": (hf.Dinov2Config, hf.Dinov2Model),
        "dinov3": (partial(hf.DINOv3ViTConfig, num_register_tokens=2), hf.DINOv3ViTModel),
        "deit": (hf.DeiTConfig, partial(hf.DeiTModel, add_pooling_layer=False)),
        "clip": (hf.CLIPVisionConfig, hf.CLIPVisionModel),
        "beit": (
            partial(hf.BeitConfig, use_shared_relative_position_bias=True),
            partial(hf.BeitModel, add_pooling_layer=False),
        ),
    }  # fmt: skip
    config, make = classes[family]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = make(config(**options)).double().eval()
        perturb(dict(model.named_parameters()), 0.2)
    stack = next(m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == 2)
    blocks = [transformers_block(layer) for layer in stack]
    if family == "beit":
        bias = model.shared_position_bias
        values = array(bias((4, 4))[0])
        for block in blocks:
            block.bias = values
    if family == "dinov3":
        cosines, sines = model.rope_embeddings(torch.zeros(1, 3, 32, 32).double())
        for block in blocks:
            block.half = True
            block.rotation = paper.rotation(array(torch.cat((sines, cosines), -1)), block.heads, half=True)
    body = getattr(model, "vision_model", model)
    final = next(getattr(body, n) for n in ("layernorm", "post_layernorm", "norm") if hasattr(body, n))
    before = (lambda x: body.pre_layrnorm(body.embeddings(x))) if family == "clip" else body.embeddings
    return model, blocks, before, (lambda t: t) if family == "clip" else final


def transformers_block(layer: nn.Module) -> paper.Block:
    parts = dict(layer.named_modules())

    def find(*names: str) -> nn.Module:
        return next(module for path, module in parts.items() for name in names if path.rpartition(".")[2] == name)

    q, k, v = find("q_proj", "query"), find("k_proj", "key"), find("v_proj", "value")
    biases = [np.zeros(16) if part.bias is None else array(part.bias) for part in (q, k, v)]
    gains = [getattr(layer, f"layer_scale{i}", None) for i in "12"]
    gains = [1.0 if g is None else array(g.lambda1) for g in gains]
    if isinstance(getattr(layer, "lambda_1", None), nn.Parameter):
        gains = [array(layer.lambda_1), array(layer.lambda_2)]
    norm1 = find("norm1", "layernorm_before", "layer_norm1")
    return paper.Block(
        2, both(norm1), (np.concatenate([array(p.weight) for p in (q, k, v)]), np.concatenate(biases)),
        both(find("out_proj", "o_proj", "dense")), both(find("norm2", "layernorm_after", "layer_norm2")),
        both(find("fc1", "up_proj")), both(find("fc2", "down_proj")), tuple(gains), epsilon=norm1.eps,
        quick=any("QuickGELU" in type(m).__name__ for m in parts.values()),
    )  # fmt: skip


@pytest.mark.parametrize("name", ["class_token", "rotation"])
@pytest.mark.parametrize("deep", [True, False])
def test_images_of_another_size(name, deep):
    make = partial(MODELS[name], dynamic_img_size=True)
    model = make().double().eval()
    perturb(dict(model.named_parameters()), 0.2)
    plain = copy.deepcopy(model)
    refold.attach(model, refold.VPT(tokens=3, deep=deep), trainable=())
    perturb(refold.trainable_parameters(model), 0.5)
    own = prompts(model)
    run = partial(paper.deep, prompts=own) if deep else partial(paper.shallow, prompts=own[0])
    x = torch.randn(2, 3, 48, 24, dtype=torch.float64)
    assert relative(model(x), formula(name, plain, x, run)) < 1e-12


class Unfolded(nn.Module):
    """A patch embedding without a convolution, and without a map of patches."""

    def __init__(self, embed: nn.Module) -> None:
        super().__init__()
        self.grid_size, weight = embed.grid_size, embed.proj.weight
        self.proj = nn.Linear(weight[0].numel(), len(weight), dtype=weight.dtype)
        self.proj.load_state_dict({"weight": weight.flatten(1), "bias": embed.proj.bias})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(nn.functional.unfold(x, 8, stride=8).transpose(1, 2))


def test_the_attention_itself_says_how_many_tokens_have_no_place():
    """Where nothing shows the grid. The start takes patches of 16 x 16 then."""
    model, other = attached("rotation", refold.VPT(tokens=3)), made("rotation")
    other.patch_embed = Unfolded(other.patch_embed)
    refold.attach(other, refold.VPT(tokens=3), example=images(model))
    bound = math.sqrt(6 / (3 * 256 + 16))
    assert all(0.9 * bound < np.abs(p).max() <= bound for p in prompts(other))
    values = {key: value for key, value in model.state_dict().items() if not key.startswith("patch_embed")}
    other.load_state_dict(other.state_dict() | values)
    assert relative(other(images(model)), model(images(model))) < 1e-12


def test_each_block_can_have_its_own_number():
    overrides = (("blocks.0", 1), ("blocks.*", 5))
    model = attached("class_token", refold.VPT(tokens=3, overrides=overrides))
    assert [len(p) for p in prompts(model)] == [1, 5]
    plain = made("class_token")
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if "refold" not in k})
    x = images(model)
    expected = formula("class_token", plain, x, partial(paper.deep, prompts=prompts(model)))
    assert relative(model(x), expected) < 1e-12
    model = attached("windows", refold.VPT(tokens=3, sites="layers.1", overrides=(("layers.1.blocks.1.attn", 2),)))
    assert [len(p) for p in prompts(model)] == [3, 2]
    refold.attach(made("windows"), refold.VPT(tokens=3, sites=("layers.0.blocks.0", "layers.1.blocks.1.attn")))


def test_counts_on_swin_b():
    """p times the widths of all blocks, 12,032: 0.22M at p = 18. On ViT-B/16 see test_core_counts."""
    with torch.device("meta"):
        model = SwinTransformer(
            img_size=64, patch_size=4, embed_dim=128, depths=(2, 2, 18, 2), num_heads=(4, 8, 16, 32), window_size=2,
            mlp_ratio=0.02,
        )  # fmt: skip
    model = model.to_empty(device="cpu")
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            nn.init.zeros_(parameter)
        if hasattr(module, "init_non_persistent_buffers"):
            module.init_non_persistent_buffers()
    for deep, tokens, count in ((True, 18, 216_576), (False, 10, 1_280)):
        refold.attach(model, refold.VPT(tokens=tokens, deep=deep), trainable=())
        assert refold.explain(model).trainable == count
        refold.detach(model)


@pytest.mark.parametrize(("name", "pixels"), [("class_token", 64), ("windows", 4), ("torchvision", 256)])
def test_the_start_is_uniform_within_the_papers_bound(name, pixels):
    model = refold.attach(made(name), refold.VPT(tokens=200))
    for slot in hosted(model).values():
        values = slot["default"].prompts.detach()
        bound = math.sqrt(6 / (3 * pixels + values.shape[1]))
        assert 0.97 * bound < float(values.abs().max()) <= bound
        assert abs(float(values.std()) - bound / math.sqrt(3)) < 0.05 * bound
