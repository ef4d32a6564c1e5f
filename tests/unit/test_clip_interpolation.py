"""WiSE-FT: the ends bit for bit, what is between by hand, and what has nothing between."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn

import refold
from refold import MergeError

Ends = tuple[nn.Module, nn.Module, dict[str, Tensor]]


def _state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.fixture(scope="module", params=["RepAdapter", "LoRA", "FullFineTune"])
def ends(request: pytest.FixtureRequest) -> Ends:
    return _ends(getattr(refold, request.param)())


def _ends(method: refold.Method) -> Ends:
    """A model, the same merged after adapters and head were changed, and the first one's state dict."""
    torch.manual_seed(0)
    start = timm.create_model("test_vit", num_classes=3).eval()
    end = copy.deepcopy(start)
    refold.attach(end, method)
    with torch.no_grad():
        for parameter in refold.trainable_parameters(end).values():
            parameter.add_(0.05 * torch.randn_like(parameter))
    refold.merge(end)
    return start, end, _state(start)


def test_the_ends_are_both_models_bit_for_bit(ends: Ends) -> None:
    start, end, before = ends
    for alpha, side in ((0, start), (1, end), (0.0, before), (1.0, _state(end))):
        found = refold.interpolate(start, end, alpha)
        wanted = side.state_dict() if isinstance(side, nn.Module) else side
        assert list(found) == list(end.state_dict())
        assert all(found[k].numpy().tobytes() == wanted[k].numpy().tobytes() for k in wanted)


@pytest.mark.parametrize("alpha", [0.25, 0.5])
def test_between_is_the_average_of_all_weights(ends: Ends, alpha: float) -> None:
    start, end, before = ends
    found = refold.interpolate(before, end, alpha)
    moved = 0
    for name, value in end.state_dict().items():
        a, b = before[name].numpy().astype(np.float64), value.numpy().astype(np.float64)
        np.testing.assert_array_equal(found[name].numpy(), ((1 - alpha) * a + alpha * b).astype(np.float32))
        moved += not np.array_equal(a, b)
    assert not torch.equal(before["head.weight"], end.state_dict()["head.weight"])
    assert moved > 2
    middle = copy.deepcopy(start)
    middle.load_state_dict(found, strict=True)
    images = torch.randn(2, 3, 160, 160)
    with torch.no_grad():
        near = min(float((middle(images) - other(images)).norm()) for other in (start, end))
    assert near > 1e-3
    assert all(torch.equal(start.state_dict()[name], value) for name, value in before.items())


def test_nothing_is_shared_with_the_ends(ends: Ends) -> None:
    start, end, before = ends
    kept = _state(end)
    for alpha in (0, 0.5, 1):
        for value in refold.interpolate(start, end, alpha).values():
            value.zero_()
    assert all(torch.equal(end.state_dict()[name], value) for name, value in kept.items())
    assert all(torch.equal(start.state_dict()[name], value) for name, value in before.items())


def test_a_merged_model_with_averaged_weights_refuses_to_go_back() -> None:
    start, end, _ = _ends(refold.RepAdapter())
    end.load_state_dict(refold.interpolate(start, end, 0.5))
    with pytest.raises(MergeError, match="changed since merge"):
        refold.unmerge(end)


def test_batchnorm_statistics_are_averaged_and_its_counter_is_the_ends() -> None:
    torch.manual_seed(0)
    start, end = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    for _ in range(5):
        end(4 + 2 * torch.randn(8, 3))
    found = refold.interpolate(start, end, 0.5)
    assert end.running_mean is not None
    assert end.running_var is not None
    torch.testing.assert_close(found["running_mean"], end.running_mean / 2)
    torch.testing.assert_close(found["running_var"], (1 + end.running_var) / 2)
    assert int(found["num_batches_tracked"]) == 5
    assert int(refold.interpolate(start, end, 0)["num_batches_tracked"]) == 0


def _attached() -> nn.Module:
    model = timm.create_model("test_vit", num_classes=3)
    return refold.attach(model, refold.LoRA(rank=2))


@pytest.mark.parametrize(
    ("start", "end", "alpha", "message"),
    [
        (lambda: nn.Linear(2, 2), lambda: nn.Linear(2, 2), -0.1, "alpha: must be between 0 and 1"),
        (lambda: nn.Linear(2, 2), lambda: nn.Linear(2, 2), float("nan"), "alpha: must be between 0 and 1"),
        (lambda: nn.Linear(2, 2, bias=False), lambda: nn.Linear(2, 2), 0.5, "bias: is in the end alone"),
        (
            lambda: nn.Linear(2, 2),
            lambda: nn.Linear(2, 3),
            1.0,
            "weight: its shape is .*2, 2.* and .*3, 2.* in the end",
        ),
        (lambda: nn.Linear(2, 2), lambda: nn.Linear(2, 2).double(), 0.5, "weight: its dtype"),
        (_attached, _attached, 0.5, "start: adapters are attached and not merged"),
        (lambda: nn.Sequential(_attached()).state_dict(), dict, 0.5, "belongs to an adapter"),
        (lambda: {"a": torch.ones(2).to(torch.float8_e4m3fn)}, lambda: {"a": torch.ones(2)}, 0.5, "a: is quantized"),
        (
            lambda: {"a": torch.tensor([1, 2])},
            lambda: {"a": torch.tensor([1, 3])},
            0.5,
            "a: holds values of torch.int64",
        ),
    ],
)
def test_what_cannot_be_averaged_is_refused(start: Any, end: Any, alpha: float, message: str) -> None:
    with pytest.raises(MergeError, match=message):
        refold.interpolate(start(), end(), alpha)


def test_torchaos_weights_are_refused() -> None:
    quantization = pytest.importorskip("torchao.quantization")
    model = nn.Sequential(nn.Linear(64, 64))
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    with pytest.raises(MergeError, match=r"0\.weight: is quantized"):
        refold.interpolate(model, model, 0.5)
