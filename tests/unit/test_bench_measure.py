"""Measurements against quantities known beforehand: a clock that the test holds, sizes counted by hand."""

from __future__ import annotations

import random
import subprocess
import sys

import pytest
import timm
import torch
from torch import nn

from refold.bench import measure
from refold.errors import RefoldError


class Clock:
    """A clock that candidates advance themselves, on a machine that slows down from call to call."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        self.pace = 1.0
        monkeypatch.setattr(measure.time, "perf_counter", lambda: self.now)

    def work(self, seconds: float) -> None:
        self.now += seconds * self.pace


# --- time -----------------------------------------------------------------------------------------------


def test_ratio_is_untouched_by_drift(monkeypatch):
    clock = Clock(monkeypatch)
    rounds = 0

    def slow():
        clock.work(0.030)

    def fast():
        clock.work(0.010)

    def drift():
        nonlocal rounds
        rounds += 1
        clock.pace = 1.0 + rounds  # each round is slower than the one before; only within a round it is fair

    real = measure._seconds

    def seconds(function, calls, wait):
        if function is drift:
            drift()
            return 1.0
        return real(function, calls, wait)

    # The drift is a candidate of its own, so it also moves between the two others within some rounds.
    monkeypatch.setattr(measure, "_seconds", seconds)
    timings = measure.latency({"slow": slow, "fast": fast, "drift": drift}, rounds=41, min_seconds=0.0)
    ratio = timings.ratio("slow", "fast")
    assert ratio.value == pytest.approx(3.0, rel=0.05)
    assert ratio.low <= 3.0 <= ratio.high
    assert timings["slow"].high > 2 * timings["slow"].low  # the times themselves drifted a lot
    assert timings["slow"].low < timings["slow"].median < timings["slow"].high


def test_rounds_interleave_all_candidates_in_changing_order(monkeypatch):
    clock, calls = Clock(monkeypatch), []

    def candidate(name):
        def run():
            calls.append(name)
            clock.work(0.010)

        return run

    timings = measure.latency({n: candidate(n) for n in "abc"}, rounds=12, warmup=1, min_seconds=0.02)
    assert {n: (t.calls, len(t.seconds)) for n, t in timings.items()} == dict.fromkeys("abc", (2, 12))
    timed = calls[3 + 3 :]  # a warm-up call and a calibrating call each
    orders = ["".join(timed[i : i + 6 : 2]) for i in range(0, len(timed), 6)]
    assert len(orders) == 12
    assert all(sorted(order) == ["a", "b", "c"] for order in orders)
    assert len(set(orders)) > 2
    assert all(second == first[::-1] for first, second in zip(orders[::2], orders[1::2], strict=True))
    assert all(t.median == pytest.approx(0.010) for t in timings.values())


def test_interval_of_the_median_covers_it():
    rng = random.Random(0)
    hits = 0
    for _ in range(500):
        values = [rng.lognormvariate(0.0, 1.0) for _ in range(15)]  # true median 1, far from normal
        ratio = measure._median_interval(values)
        assert ratio.low <= ratio.value <= ratio.high
        hits += ratio.low <= 1.0 <= ratio.high
    assert 0.94 <= hits / 500 <= 0.99  # 96.5 % by the binomial law


def test_cost_rows_are_relative_to_the_reference(monkeypatch):
    clock = Clock(monkeypatch)
    timings = measure.latency({"backbone": lambda: clock.work(0.020), "merged": lambda: clock.work(0.021)}, rounds=8)
    backbone, merged = measure.cost_rows(timings, batch=4, reference="backbone")
    assert (backbone["name"], backbone["batch"], backbone["ratio"]) == ("backbone", 4, 1.0)
    assert merged["median_ms"] == pytest.approx(21.0)
    assert merged["ratio"] == pytest.approx(1.05)
    assert merged["ratio_low"] <= merged["ratio"] <= merged["ratio_high"]


def test_real_time_is_measured():
    # One thread: a parallel product of small matrices waits for its threads where the machine is busy.
    timings = measure.latency(
        {"small": lambda: sum(range(1_000)), "large": lambda: sum(range(200_000))}, rounds=7, min_seconds=0.002
    )
    assert timings.ratio("large", "small").value > 20
    assert timings["small"].calls > timings["large"].calls


def test_latency_refuses_nonsense():
    with pytest.raises(RefoldError, match="at least one candidate"):
        measure.latency({})
    with pytest.raises(RefoldError, match="one round"):
        measure.latency({"a": lambda: None}, rounds=0)
    timings = measure.latency({"a": lambda: None}, rounds=1, min_seconds=0.0)
    with pytest.raises(RefoldError, match=r"'b' was not measured in this run\. Measured: a"):
        timings.ratio("a", "b")


# --- memory ---------------------------------------------------------------------------------------------


def test_stored_bytes_of_a_linear_layer_by_hand():
    layer, images = nn.Linear(16, 8), torch.randn(32, 16)
    stored = measure.stored_bytes(lambda: layer(images).sum(), layer)
    assert stored.activations == 32 * 16 * 4  # the input, needed for the gradient of the weight
    layer.weight.requires_grad_(False)
    assert measure.stored_bytes(lambda: layer(images).sum(), layer).activations == 0


def test_stored_bytes_counts_a_storage_once_and_sets_parameters_apart():
    model = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 8, bias=False))
    images = torch.randn(32, 16)
    stored = measure.stored_bytes(lambda: model(images).sum(), model)
    # ReLU's output is saved by ReLU and by the second layer; the second weight is saved for the gradient
    # of its input, the first is not because the images need none.
    assert stored.activations == 32 * 16 * 4 + 32 * 24 * 4
    assert stored.parameters == 24 * 8 * 4
    assert stored.tensors == 2


def test_stored_bytes_is_not_fooled_by_reused_addresses():
    layer = nn.Linear(4, 4)

    def step():
        for _ in range(10):  # each graph dies before the next, whose memory would lie at the same address
            layer(torch.randn(256, 4)).sum()

    assert measure.stored_bytes(step, layer).activations == 10 * 256 * 4 * 4


def test_a_frozen_backbone_stores_less():
    model = timm.create_model("test_vit", num_classes=5)
    images = torch.randn(2, 3, *model.default_cfg["input_size"][1:])
    everything = measure.stored_bytes(lambda: model(images).sum(), model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("head."))
    head = measure.stored_bytes(lambda: model(images).sum(), model)
    tokens = 1 + (images.shape[-1] // 16) ** 2  # a view of one token pins all of them
    assert head.activations == 2 * tokens * 64 * 4 < everything.activations / 50


def test_peak_memory_is_this_process_and_not_the_one_that_started_it():
    block = torch.ones(100_000_000)  # 400 MB
    here = measure.peak_memory("cpu")
    assert here > block.numel() * 4
    code = "from refold.bench import measure; print(measure.peak_memory('cpu'))"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 50e6 < int(child.stdout) < here - 200e6


# --- operations and parameters ----------------------------------------------------------------------------


def test_operations_by_hand():
    assert measure.count_operations(nn.Linear(16, 8), torch.randn(4, 16)) == 2 * 4 * 16 * 8
    conv = nn.Conv2d(4, 8, 3, padding=1, groups=2)
    assert measure.count_operations(conv, torch.randn(1, 4, 5, 6)) == 2 * 5 * 6 * 8 * (4 // 2) * 9


def test_operations_of_fused_attention_are_seen():
    layer = nn.TransformerEncoderLayer(16, 2, dim_feedforward=32, batch_first=True)
    for parameter in layer.parameters():
        parameter.requires_grad_(False)
    tokens, width = 7, 16
    projections = 2 * tokens * width * (4 * width + 2 * 32)
    attention = 2 * 2 * tokens * tokens * width
    assert measure.count_operations(layer, torch.randn(1, tokens, width)) == projections + attention
    assert torch.backends.mha.get_fastpath_enabled()


def test_counting_leaves_modes_and_statistics_alone():
    model = timm.create_model("test_efficientnet")
    model.train()
    first = next(m for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    first.eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    assert measure.count_operations(model, torch.randn(1, 3, 64, 64)) > 0
    assert model.training
    assert not first.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_parameters_count_shared_ones_once():
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False), nn.Linear(4, 2))
    model[1].weight = model[0].weight
    model[2].bias.requires_grad_(False)
    assert measure.count_parameters(model) == measure.ParameterCount(total=16 + 10, trainable=16 + 8)
