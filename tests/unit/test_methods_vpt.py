"""VPT against its formulas on every kind of position, its start and counts, and that nothing else passes."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from timm.models.beit import Beit
from timm.models.eva import Eva
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer_relpos import VisionTransformerRelPos
from torch import nn

import refold
from reference import prompts as paper
from refold.hosting import hooks_left, hosted
from zoo import build, images, perturb, relative, vit

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, "mlp_ratio": 2, "num_classes": 3}
eva = partial(Eva, **SMALL, use_abs_pos_emb=False, use_rot_pos_emb=True, num_reg_tokens=2, init_values=0.5)
beit = partial(Beit, **SMALL)
relpos = partial(VisionTransformerRelPos, **SMALL)
swin = partial(
    SwinTransformer, img_size=32, patch_size=2, embed_dim=8, depths=(2, 2), num_heads=(1, 2), window_size=4,
    mlp_ratio=2, num_classes=3, drop_path_rate=0.0,
)  # fmt: skip

#: What has tokens, and what tells where they are.
MODELS: dict[str, Callable[[], nn.Module]] = {
    "class_token": partial(vit, patch_size=8),
    "registers": partial(vit, patch_size=8, reg_tokens=4),
    "average_pool": partial(vit, patch_size=8, class_token=False, global_pool="avg"),
    "average_pool_beside_a_class_token": partial(vit, patch_size=8, global_pool="avg"),
    "layer_scale": partial(vit, patch_size=8, init_values=0.5),
    "torchvision": lambda: build("torchvision_vit"),
    "open_clip": lambda: build("open_clip_tower"),
    "rotation": eva,
    "rotation_of_halves": partial(eva, rope_type="dinov3", rope_rotate_half=True, attn_type="rope"),
    "rotation_of_each_head": partial(eva, rope_type="mixed"),
    "bias_by_relative_position": partial(beit, use_rel_pos_bias=True, use_abs_pos_emb=False),
    "bias_of_all_blocks": partial(beit, use_shared_rel_pos_bias=True),
    "bias_from_a_table": partial(relpos, rel_pos_type="bias"),
    "bias_from_a_table_with_class_token": partial(relpos, rel_pos_type="bias", class_token=True, global_pool="token"),
    "bias_from_an_mlp": partial(relpos, rel_pos_type="mlp"),
    "bias_from_an_mlp_with_class_token": partial(relpos, rel_pos_type="mlp", class_token=True, global_pool="token"),
    "windows": swin,
}


def made(name: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    """With weights that hide nothing, relative positions among them."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(len(name))
        model = MODELS[name]().eval().to(dtype)
        perturb(dict(model.named_parameters()), 0.2)
    return model


def attached(name: str, method: refold.Method, dtype: torch.dtype = torch.float64) -> nn.Module:
    model = refold.attach(made(name, dtype), method)
    perturb(refold.trainable_parameters(model), 0.5)
    return model


def prompts(model: nn.Module) -> list[np.ndarray]:
    return [slot["default"].prompts.detach().numpy() for slot in hosted(model).values()]


# -- the formula --------------------------------------------------------------------------------------------------


def array(value: torch.Tensor) -> np.ndarray:
    return value.detach().double().numpy().copy()


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


@pytest.mark.parametrize("family", ["vit", "dinov2", "deit", "clip", "beit"])
def test_transformers_backbones_are_the_formula_too(family):
    model, blocks, embedded, tail = transformers_model(family)
    refold.attach(model, refold.VPT(tokens=3), trainable=())
    perturb(refold.trainable_parameters(model), 0.5)
    x, own = images(model), prompts(model)
    with refold.disabled(model), torch.no_grad():
        tokens = embedded(x)
    at = 2 if family == "deit" else 1
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
    body = getattr(model, "vision_model", model)
    final = next(getattr(body, n) for n in ("layernorm", "post_layernorm") if hasattr(body, n))
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
        both(find("fc1")), both(find("fc2")), tuple(gains), epsilon=norm1.eps,
        quick=any("QuickGELU" in type(m).__name__ for m in parts.values()),
    )  # fmt: skip


# -- start, counts, training --------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("deep", [True, False])
def test_every_token_learns_from_the_first_step(name, deep):
    model = refold.attach(made(name, torch.float32), refold.VPT(tokens=3, deep=deep)).train()
    model(images(model)).pow(2).sum().backward()
    found = {n: p.grad for n, p in refold.trainable_parameters(model).items()}
    assert sum("prompts" in n for n in found) == (len(hosted(model)) if deep else 1)
    assert all(bool(g.abs().amax(-1).gt(0).all()) for n, g in found.items() if "prompts" in n)
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


def test_dropout_takes_numbers_from_each_image_and_only_in_training():
    method = refold.VPT(tokens=4, dropout=0.5)
    adapter = method.build(refold.state.state_of(attached("class_token", method)).record().sites[0], None, None)
    kept = adapter.tokens(64)
    assert set(kept.detach().ne(0).float().mean(0).flatten().gt(0.2).tolist()) == {True}
    assert torch.equal(kept[kept != 0], (2 * adapter.prompts.expand(64, -1, -1))[kept != 0])
    assert 0.45 < float(kept.ne(0).float().mean()) < 0.55
    model = attached("class_token", method)
    x = images(model)
    assert torch.equal(model(x), model(x))
    assert not torch.equal(model.train()(x), model(x))


@pytest.mark.parametrize("name", ["class_token", "rotation", "bias_by_relative_position", "windows"])
@pytest.mark.parametrize("deep", [True, False])
def test_checkpoints_give_the_same_gradient(name, deep):
    model = attached(name, refold.VPT(tokens=3, deep=deep)).train()
    x, grads = images(model), []
    for checkpointing in (False, True):
        model.set_grad_checkpointing(checkpointing)
        model.zero_grad()
        if name == "windows" and not deep and checkpointing:
            # A block alone, run again behind the forward, does not see what the block before made of its prompts.
            with pytest.raises(refold.SiteError, match="were not seen in this call"):
                model(x).pow(2).sum().backward()
            return
        model(x).pow(2).sum().backward()
        grads.append([p.grad.clone() for p in refold.trainable_parameters(model).values()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("deep", [True, False])
def test_low_precision_stays_near(name, deep):
    model = attached(name, refold.VPT(tokens=3, deep=deep), torch.float32)
    x = images(model)
    exact = model(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert relative(model(x), exact) < 0.05
    assert next(p for n, p in model.named_parameters() if "prompts" in n).dtype == torch.float32
    low = model.bfloat16()
    assert relative(low(x.bfloat16()), exact) < 0.1
    refold.attach(made(name, torch.bfloat16), refold.VPT(tokens=3, deep=deep))


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


@pytest.mark.parametrize(
    "name", ["class_token", "rotation", "bias_by_relative_position", "bias_from_an_mlp", "windows"]
)
@pytest.mark.parametrize("deep", [True, False])
def test_it_exports(name, deep):
    model = attached(name, refold.VPT(tokens=3, deep=deep), torch.float32)
    x = images(model)
    program = torch.export.export(model, (x,)).module()
    other = images(model, seed=1)
    assert relative(program(other), model(other)) < 1e-5
    assert relative(program(other), program(x)) > 1e-3


# -- states -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("deep", [True, False])
def test_files_copies_and_the_way_back(name, deep, tmp_path):
    model = attached(name, refold.VPT(tokens=3, deep=deep))
    x = images(model)
    before = model(x)
    path = refold.save(model, tmp_path / "prompts.safetensors")
    for other in (refold.load(made(name), path), copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), before)
    plain = made(name)
    with refold.disabled(model), torch.no_grad():
        assert torch.equal(model(x), plain(x))
    with pytest.raises(refold.MergeError, match="VPT"):
        refold.merge(model)
    refold.detach(model)
    assert hooks_left(model) == 0
    with torch.no_grad():
        assert torch.equal(model(x), plain(x))
    for ours, theirs in zip(model.modules(), plain.modules(), strict=True):
        assert ours.__dict__.keys() == theirs.__dict__.keys()
        assert all(ours.__dict__[k] == v for k, v in theirs.__dict__.items() if isinstance(v, (int, tuple)))
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), plain.state_dict().values(), strict=True))


class Interrupt(BaseException):
    """As Ctrl-C is one, torch runs no hook behind it."""


@pytest.mark.parametrize("name", ["rotation", "bias_by_relative_position", "bias_from_an_mlp", "windows"])
@pytest.mark.parametrize("kind", [ValueError, Interrupt])
def test_positions_come_back_when_a_forward_breaks(name, kind):
    model = attached(name, refold.VPT(tokens=3))
    x = images(model)
    before, plain = model(x), made(name)

    def broken(*args):
        raise kind

    block = model.layers[0].blocks[1] if name == "windows" else model.blocks[1]
    handle = block.attn.proj.register_forward_hook(broken)
    with pytest.raises(kind):
        model(x)
    if kind is ValueError:
        assert attributes(model) == attributes(plain)
    handle.remove()
    assert torch.equal(model(x), before)
    assert attributes(model) == attributes(plain)
    block.attn.proj.register_forward_hook(broken)
    with pytest.raises(kind):
        model(x)
    refold.detach(model)
    assert attributes(model) == attributes(plain)


def attributes(model: nn.Module) -> list[tuple[object, ...]]:
    names = ("num_prefix_tokens", "prefix_tokens", "window_area", "window_size", "bias_shape")
    tables = ("relative_position_index", "relative_position_bias_table")
    return [
        (*(m.__dict__.get(n) for n in names), *(n in m.__dict__ and m.__dict__[n] is not None for n in tables))
        for p, m in model.named_modules()
        if "refold" not in p
    ]


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


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"tokens": 0}, "tokens=0"),
        ({"deep": 1}, "deep=1"),
        ({"dropout": 1.0}, "dropout"),
        ({"overrides": (("blocks.0", 0),)}, "overrides"),
        ({"deep": False, "overrides": (("blocks.0", 2),)}, "shallow prompts are one set"),
        ({"overrides": (("block.0", 2),)}, "none of the adapted layers matches"),
        ({"sites": "layers.0"}, "no block has this path"),
        ({"sites": "patch_embed"}, "no block has this path"),
    ],
)
def test_what_it_is_told_must_make_sense(options, reason):
    with pytest.raises(refold.SiteError, match=reason):
        refold.attach(made("class_token"), refold.VPT(**options))
