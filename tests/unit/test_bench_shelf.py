"""What the shelf counts equals the papers' closed formulas, in parameters and in operations."""

from __future__ import annotations

import sys

import pytest

import refold
from refold.bench.shelf import Shelf
from refold.hosting import hooks_left, hosted

L, d = 12, 768  # blocks and width of ViT-B/16
N = 197  # tokens at 224 px, the class token included
#: Operations of its forward: projections of the blocks, the two products of attention, the patch embedding.
FORWARD = L * (2 * N * 12 * d * d + 4 * N * N * d) + 2 * 196 * (16 * 16 * 3) * d


@pytest.fixture(scope="module")
def shelf() -> Shelf:
    return Shelf()


def site(hidden: int) -> int:
    """One bottleneck with both biases."""
    return 2 * d * hidden + hidden + d


#: Method, its settings, its parameters on ViT-B/16, and what its adapters add to FORWARD.
FORMULAS = [
    ("RepAdapter", {}, 2 * L * (d * 8 + d * 8 // 2 + 8 + d), None),
    ("RepAdapter", {"sites": "attention"}, L * (d * 8 + d * 8 // 2 + 8 + d), None),
    ("LoRA", {}, 4 * L * d * 8, L * 2 * N * (d * 8 + 8 * 3 * d)),
    ("FacT", {"form": "tt", "rank": 4}, 2 * d * 4 + 12 * L * 4**2, None),
    ("FacT", {"form": "tk", "rank": 16}, 2 * d * 16 + 12 * L * 16 + 16**3, None),
    ("SSF", {}, 2 * (L * (3 * d + d + 4 * d + d + d + d) + 2 * d), 0),
    ("AdaptFormer", {}, L * site(8), L * 2 * N * 2 * d * 8),
    ("AdaptFormer", {"hidden": 64}, L * site(64), L * 2 * N * 2 * d * 64),
    ("Adapter", {"variant": "pfeiffer"}, L * site(8), L * 2 * N * 2 * d * 8),
    ("Adapter", {"variant": "houlsby"}, 2 * L * site(8), 2 * L * 2 * N * 2 * d * 8),
    ("Adapter", {"variant": "adapter+"}, L * (site(8) + d), L * 2 * N * 2 * d * 8),
    ("Convpass", {}, 2 * L * (site(8) + 9 * 8 * 8 + 8), None),
    ("Convpass", {"sites": "attention"}, L * (site(8) + 9 * 8 * 8 + 8), None),
    ("VPT", {"tokens": 100}, L * 100 * d, L * (2 * 100 * 12 * d * d + 4 * (297**2 - N**2) * d)),
    ("DTL", {}, 2 * d * 2 * L, None),
    ("DTL", {"plus": True}, 2 * d * 2 * L + 9 * d, None),
    ("KAdaptation", {}, L * (4 * 32 * 24 + d) + 4 * 32 * 32, None),
    ("STAdapter", {}, 2 * L * (2 * d * 384 + 4 * 384 + 384 + d), None),
    ("STAdapter", {"sites": "mlp"}, L * (2 * d * 384 + 4 * 384 + 384 + d), None),
    ("BitFit", {}, 11 * L * d + 2 * d, 0),
    ("LayerNormTune", {}, 4 * L * d + 2 * d, 0),
    ("Partial", {}, 12 * d * d + 13 * d + 2 * d, 0),
    ("LinearProbe", {}, 0, 0),
]


@pytest.mark.parametrize(
    ("name", "settings", "parameters", "added"), FORMULAS, ids=[f"{n}-{s}".replace(" ", "") for n, s, _, _ in FORMULAS]
)
def test_counts_are_the_closed_formulas(shelf, name, settings, parameters, added):
    cost = shelf.cost(refold.METHODS[name](**settings), operations=added is not None)
    assert cost.backbone == "vit_base_patch16_224"
    assert cost.parameters == parameters
    if added is None:
        assert cost.extra is None
    else:
        assert cost.extra == pytest.approx(added / FORWARD, rel=1e-9, abs=1e-12)


def test_full_fine_tuning_is_the_whole_backbone(shelf):
    cost = shelf.cost(refold.FullFineTune())
    assert (cost.parameters, cost.share, cost.extra) == (85_798_656, 1.0, 0.0)


def test_a_method_without_a_place_in_a_vit_is_counted_on_a_resnet(shelf):
    cost = shelf.cost(refold.RepAdapter(sites="layer1.0.conv1", rank=4, groups=2))
    assert cost.backbone == "resnet50"
    assert cost.parameters == 64 * 4 + 4 + 64 * 4 // 2 + 64
    assert cost.share == pytest.approx(cost.parameters / 23_508_032)


def test_a_method_without_a_place_anywhere_is_refused_with_the_first_reason(shelf):
    with pytest.raises(refold.SiteError, match="nose: no layer has this path or role"):
        shelf.cost(refold.LoRA(sites="nose"))


def test_counting_leaves_the_backbone_as_it_was(shelf):
    model = shelf.survey("vit_base_patch16_224").model
    first, example = shelf.cost(refold.AdaptFormer()), shelf.survey("vit_base_patch16_224").example
    assert (hooks_left(model), hosted(model)) == (0, {})
    shelf.cost(refold.METHODS["STAdapter"](), operations=False)  # its plan asks for whole clips
    assert shelf.survey("vit_base_patch16_224").example is example
    assert shelf.cost(refold.AdaptFormer()) == first


def test_the_backbone_has_no_values(shelf):
    assert {p.device.type for p in shelf.survey("vit_base_patch16_224").model.parameters()} == {"meta"}


def test_without_timm_the_error_names_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(refold.MissingExtraError, match="'timm' is not installed"):
        Shelf()
