"""What each entry costs beside full fine-tuning and the plain backbone: a training step, stored bytes, inference.

A step is one forward and backward pass at 112 px, batch 32, as refold's trainer runs it (its choice of precision and
attention kernel); stored bytes are what autograd keeps for it. Inference is float32, merged where the
method folds away, at batch 1 and 16. Every number is a ratio of two candidates timed side by side in one run.
One file an entry in ``results/cost``: half a minute each, on a quiet machine.
"""

from __future__ import annotations

import copy
import json
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

import accuracy_runs
import common
import refold
from accuracy_entries import Entry
from refold.bench import measure
from refold.training.attention import choose_attention
from refold.training.precision import flush_denormals, reduced_precision, resolve_precision

COSTS = common.RESULTS / "cost"
CLASSES, BATCH = 2, 32
STEP_ROUNDS, INFERENCE_ROUNDS = 9, 15


def read(entry: Entry) -> dict[str, Any] | None:
    """What was measured, if it was with these settings."""
    path = COSTS / f"{entry.slug}.json"
    record = json.loads(path.read_text()) if path.exists() else None
    return record if record is not None and accuracy_runs.same(record["settings"], entry.build()) else None


def cost(entry: Entry) -> dict[str, Any]:
    """Measure an entry, or read what an earlier start left."""
    record = read(entry)
    if record is not None:
        return record
    record = {
        "method": entry.label,
        "backbone": entry.backbone,
        "settings": entry.build().to_json(),
        "step": _step(entry),
        "inference": _inference(entry),
        "environment": measure.environment(),
    }
    COSTS.mkdir(parents=True, exist_ok=True)
    (COSTS / f"{entry.slug}.json").write_text(json.dumps(record, indent=1) + "\n")
    step, one = record["step"], record["inference"]["batch_1"]
    print(f"{entry.label}: step {step['ratio']:.2f}, stored {step['stored_ratio']:.2f}, batch 1 {one['ratio']:.2f}")
    return record


def _build(entry: Entry) -> nn.Module:
    torch.manual_seed(0)
    return accuracy_runs.attach(entry, None, CLASSES)[0]


def _step(entry: Entry) -> dict[str, Any]:
    full = Entry("full fine-tuning", "FullFineTune", backbone=entry.backbone)
    size = accuracy_runs.SIZE
    images, targets = torch.randn(BATCH, 3, size, size), torch.randint(0, CLASSES, (BATCH,))
    functions, stored = {}, {}
    precision = resolve_precision("auto", torch.device("cpu"))
    with ExitStack() as stack:
        stack.enter_context(flush_denormals())
        for name, candidate in {"full": full, "method": entry}.items():
            model = _build(candidate).train()
            if precision == "bf16":
                stack.enter_context(reduced_precision(model))
            forward = common.training_forward(model, images, targets, low=precision == "bf16")
            kernel = choose_attention(forward, torch.device("cpu"))
            functions[name] = common.training_step(model, forward, kernel)
            stored[name] = measure.stored_bytes(forward, model).activations
        timings = measure.latency(functions, rounds=STEP_ROUNDS, warmup=1)
    ratio = timings.ratio("method", "full")
    return {
        "precision": precision,
        "seconds": timings["method"].median,
        "ratio": ratio.value,
        "interval": [ratio.low, ratio.high],
        "stored_bytes": stored["method"],
        "stored_ratio": stored["method"] / stored["full"],
    }


def _inference(entry: Entry) -> dict[str, Any]:
    model = _build(entry)
    plain = refold.detach(copy.deepcopy(model)).eval()
    common.perturb(model)
    model.eval()
    found: dict[str, Any] = {"merged": True}
    try:
        refold.merge(model)
    except refold.MergeError as error:
        found |= {"merged": False, "reason": str(error)}
    for batch in (1, 16):
        images = torch.randn(batch, 3, accuracy_runs.SIZE, accuracy_runs.SIZE)
        with torch.inference_mode():
            functions = {"plain": lambda x=images: plain(x), "method": lambda x=images: model(x)}
            timings = measure.latency(functions, rounds=INFERENCE_ROUNDS)
        ratio = timings.ratio("method", "plain")
        found[f"batch_{batch}"] = {
            "ms": 1e3 * timings["method"].median,
            "ratio": ratio.value,
            "interval": [ratio.low, ratio.high],
        }
    return found
