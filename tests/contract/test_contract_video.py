"""Every method on every family of models of clips: attached, trained and merged as on images, or refused by name."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from test_contract_methods import METHODS, NOISY
from torch import Tensor, nn

import refold
import zoo
from refold.state import state_of
from refold.video.models import ClipModel, FrameModel
from zoo import CLASSES, perturb, relative

FRAMES, SIZE = 4, 32
EXACT = 1e-12


def transformers(name: str, **options: object) -> ClipModel:
    import transformers

    config = getattr(transformers, f"{name}Config")(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        image_size=SIZE, num_frames=FRAMES, num_labels=CLASSES, **options,
    )  # fmt: skip
    model = getattr(transformers, f"{name}ForVideoClassification")(config)
    return ClipModel(model, FRAMES, (SIZE, SIZE), channels_first=False)


def swin3d() -> ClipModel:
    from torchvision.models.video.swin_transformer import SwinTransformer3d

    model = SwinTransformer3d(
        patch_size=[2, 4, 4], embed_dim=16, depths=[1, 2], num_heads=[1, 2], window_size=[2, 4, 4],
        stochastic_depth_prob=0.0, num_classes=CLASSES,
    )  # fmt: skip
    return ClipModel(model, FRAMES, (SIZE, SIZE), channels_first=True)


def mvit(second: bool) -> ClipModel:
    """Of the first or the second version: where positions are, and where the width grows."""
    from torchvision.models.video.mvit import MSBlockConfig, MViT

    widths = (16, 16, 16, 32) if second else (16, 32, 32, 32)
    pooled = ([3, 3, 3], [1, 1, 1]) if second else ([], [])  # kernel and stride of the first queries
    blocks = [
        MSBlockConfig(1, *widths[:2], pooled[0], [3, 3, 3], pooled[1], [1, 2, 2]),
        MSBlockConfig(2, *widths[2:], [3, 3, 3], [3, 3, 3], [1, 2, 2], [1, 1, 1]),
    ]
    model = MViT(
        (SIZE, SIZE), FRAMES, blocks, residual_pool=second, residual_with_cls_embed=False, rel_pos_embed=second,
        proj_after_attn=second, dropout=0.0, num_classes=CLASSES,
    )  # fmt: skip
    return ClipModel(model, FRAMES, (SIZE, SIZE), channels_first=True)


FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "videomae": partial(transformers, "VideoMAE", patch_size=16),
    "timesformer": partial(transformers, "Timesformer", patch_size=16),
    "vivit": partial(transformers, "Vivit", tubelet_size=[2, 16, 16]),
    "swin3d": swin3d,
    "mvit_v1": partial(mvit, second=False),
    "mvit_v2": partial(mvit, second=True),
    "frames": lambda: FrameModel(zoo.vit(), FRAMES),
}
SETTINGS = METHODS | {"STAdapter": refold.STAdapter(hidden=4, frames=FRAMES)}

_TUBES = ("videomae", "timesformer", "vivit", "mvit_v1", "mvit_v2")
_NO_GRID = dict.fromkeys(_TUBES, "nothing shows how its tokens lie on a grid") | {
    "swin3d": "a grid of more than rows and columns"
}
_NARROWS = {"mvit_v1": "no module alone turns the features", "mvit_v2": "no module alone turns the features"}
#: What convolves over rows and columns has no place among tokens of clips, nor have prompts where their number matters.
REFUSED: dict[str, dict[str, str]] = {
    "Mona": _NO_GRID,
    "Convpass": _NO_GRID,
    "STAdapter": _NO_GRID,
    "ProTuning": _NO_GRID,
    "SPM": _NO_GRID,
    "ConvAdapter": _NO_GRID | {"mvit_v1": "no convolution leads from the maps"},
    "DTL": _NO_GRID | {"mvit_v1": "none has the number 1"},
    "LST": {family: reason for family, reason in _NO_GRID.items() if family in ("swin3d", "mvit_v1", "mvit_v2")},
    "E3VA": _NARROWS,
    "VPT": {
        "timesformer": "with more tokens it fails",
        "swin3d": "its features are maps",
        "mvit_v1": "given features of shape",
        "mvit_v2": "with more tokens it fails",
    },
}
PAIRS = [
    pytest.param(family, method, id=f"{family}-{name}")
    for name, method in SETTINGS.items()
    for family in FAMILIES
    if family not in REFUSED.get(name, {})
]


def build(family: str) -> nn.Module:
    """In float64 at evaluation, the same at every call, with biases, norms and tables that matter."""
    torch.manual_seed(len(family))
    model = FAMILIES[family]().eval()
    perturb({n: p for n, p in model.named_parameters() if p.dim() <= 1 or not bool(p.any())}, 0.2)
    return model.double()


def clips(count: int = 2, seed: int = 0) -> Tensor:
    return torch.randn(count, FRAMES, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(("family", "method"), PAIRS)
def test_starts_as_the_model_trains_whole_and_merges_exactly(family, method):
    model = build(family)
    plain, before = model(clips()).detach(), {n: v.clone() for n, v in model.state_dict().items()}
    refold.attach(model, method)  # the model says what a clip is
    start = relative(model(clips()), plain)
    assert start < 2 if type(method).__name__ in NOISY | {"VPT", "E3VA"} else start == 0

    trainable = refold.trainable_parameters(model)
    perturb(trainable, 0.01)
    model.train()
    for seed in range(2):
        model(clips(4, seed)).pow(2).sum().backward()
    reached = {n for n, p in trainable.items() if p.grad is not None and bool(p.grad.any())}
    assert set(trainable) - reached == late(family, model, trainable)

    model.eval()
    perturb(trainable)
    adapted = model(clips()).detach()
    assert relative(adapted, plain) > 1e-3
    if method.mergeable:
        assert refold.merge(model).checked
        assert relative(model(clips()), adapted) <= EXACT
    refold.detach(model)
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())


def late(family: str, model: nn.Module, trainable: dict[str, nn.Parameter]) -> set[str]:
    """What gets no gradient in the model itself: what changes only patches, behind the last place they are read."""
    if family.startswith("mvit"):  # the last queries of patches; its head reads the class token
        last = "backbone.blocks.1.attn."
        return {n for n in trainable if n.startswith((f"{last}pool_q.pool.", f"{last}rel_pos_"))}
    if family == "frames" and isinstance(state_of(model).record().method, refold.STAdapter):
        host = state_of(model).record().sites[-1].path
        return {n for n in trainable if n.startswith(f"{host}.refold.")}
    return set()


@pytest.mark.parametrize(("name", "family"), [(name, family) for name, found in REFUSED.items() for family in found])
def test_a_family_without_a_place_for_it_is_refused_and_left_alone(name, family):
    model = build(family)
    before = {n: v.clone() for n, v in model.state_dict().items()}
    with pytest.raises(refold.SiteError, match=REFUSED[name][family]):
        refold.attach(model, SETTINGS[name])
    assert state_of(model) is None
    assert list(model.state_dict()) == list(before)


#: Role -> the layers that the papers mean, in the first block, and how many blocks there are.
PLACES = {
    "videomae": {
        "attention": ["attention.attention.query", "attention.attention.key", "attention.attention.value"],
        "attention_out": ["attention.output.dense"],
        "mlp": ["intermediate.dense"],
        "mlp_out": ["output.dense"],
    },
    "timesformer": {  # both halves of the divided attention
        "attention": ["temporal_attention.attention.qkv", "attention.attention.qkv"],
        "attention_out": ["temporal_attention.output.dense", "attention.output.dense"],
        "mlp": ["intermediate.dense"],
        "mlp_out": ["output.dense"],
    },
    "vivit": {
        "attention": ["attention.q_proj", "attention.k_proj", "attention.v_proj"],
        "attention_out": ["attention.o_proj"],
        "mlp": ["mlp.fc1"],
        "mlp_out": ["mlp.fc2"],
    },
    "swin3d": {"attention": ["attn.qkv"], "attention_out": ["attn.proj"], "mlp": ["mlp.0"], "mlp_out": ["mlp.3"]},
    "mvit_v1": {"attention": ["attn.qkv"], "attention_out": ["attn.project.0"], "mlp": ["mlp.0"], "mlp_out": ["mlp.3"]},
    "mvit_v2": {"attention": ["attn.qkv"], "attention_out": ["attn.project.0"], "mlp": ["mlp.0"], "mlp_out": ["mlp.3"]},
}
BLOCKS = {
    "videomae": ["backbone.videomae.encoder.layer.0.", "backbone.videomae.encoder.layer.1."],
    "timesformer": ["backbone.timesformer.encoder.layer.0.", "backbone.timesformer.encoder.layer.1."],
    "vivit": ["backbone.vivit.layers.0.", "backbone.vivit.layers.1."],
    "swin3d": ["backbone.features.0.0.", "backbone.features.2.0.", "backbone.features.2.1."],
    "mvit_v1": ["backbone.blocks.0.", "backbone.blocks.1."],
    "mvit_v2": ["backbone.blocks.0.", "backbone.blocks.1."],
}


@pytest.mark.parametrize("family", PLACES)
def test_papers_placements_resolve(family):
    for role, layers in PLACES[family].items():
        model = refold.attach(build(family), refold.LoRA(rank=2, sites=role))
        found = {row.path for row in refold.explain(model).rows if row.role == role}
        assert found == {block + layer for block in BLOCKS[family] for layer in layers}


@pytest.mark.parametrize("family", FAMILIES)
def test_what_reaches_every_layer_reaches_the_patch_embedding(family):
    model = build(family)
    embeddings = [p for p, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Conv3d))]
    ssf = {row.path for row in refold.explain(refold.attach(build(family), refold.SSF())).rows}
    assert set(embeddings) <= ssf
    biases = {n for n, p in model.named_parameters() if n.rpartition(".")[2] == "bias"}
    assert biases <= set(refold.trainable_parameters(refold.attach(build(family), refold.BitFit())))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("bare", [False, True], ids=["wrapped", "bare"])
def test_a_file_carries_it_for_the_wrapped_and_the_bare_model(family, bare, tmp_path):
    def made() -> tuple[nn.Module, Tensor]:
        model = build(family)
        x = clips()
        if not bare:
            return model, x
        inside = model.get_submodule("backbone")
        if isinstance(model, FrameModel):
            return inside, x.flatten(0, 1)
        return inside, x.transpose(1, 2) if model.channels_first else x

    def scores(model: nn.Module, x: Tensor) -> Tensor:
        out = model(x)
        return out if isinstance(out, Tensor) else out.logits

    model, x = made()
    refold.attach(model, refold.RepAdapter(rank=4), example=x[:1])
    perturb(refold.trainable_parameters(model))
    path = refold.save(model, tmp_path / "adapter.safetensors")
    other = refold.load(made()[0], path, example=x[:1])
    assert torch.equal(scores(other, x), scores(model, x))
    refold.merge(other)
    assert relative(scores(other, x), scores(model, x)) <= EXACT
    stranger = made()[0]
    perturb(dict(stranger.named_parameters()))
    with pytest.raises(refold.StoreError, match="has other values"):
        refold.load(stranger, path, example=x[:1])


def test_an_adapter_that_mixes_frames_is_refused_where_it_would_mix_clips():
    with pytest.raises(refold.SiteError, match=r"clips have 4 frames, not 8. Use STAdapter\(frames=4\)"):
        refold.attach(build("frames"), refold.STAdapter(frames=8))
    model = refold.attach(build("frames"), SETTINGS["STAdapter"])
    perturb(refold.trainable_parameters(model))
    first, second = clips(2)
    together = model(torch.stack((first, second)))
    assert relative(together[0], model(first[None])[0]) <= EXACT  # no clip sees another
    assert relative(model(first.flip(0)[None]), model(first[None])) > 1e-4  # and the order of frames matters
    with pytest.raises(refold.DataError, match=r"\(B, 4, C, H, W\), not \(2, 8, 3, 32, 32\)"):
        model(torch.cat((clips(), clips()), dim=1))
