"""What training a dense model takes: stored activations, weights, gradients, optimizer, and time of the backbone part.

    python benchmarks/dense_memory.py [memory] [time] [report] [--only swin_tiny]

* memory: one training forward of the whole model, batch 1, at the paper's image size, in float32: bytes that autograd
  keeps for the backward pass, and four bytes a weight, four a gradient, eight of AdamW. What an accelerator's allocator
  and its convolution workspaces add is not in it. Random weights: bytes do not depend on them.
* time: forward and backward of the backbone alone, all candidates side by side in one run, on a quiet machine.

Cached is a later epoch, in which the backbone does not run; the records, in main memory or on disk, are not counted.

Frozen is the backbone without adapter, its heads training. LoRA is PEFT's, on qkv, rank 8. One file a piece in
``results/dense-memory``; the tables go to ``docs/dense.md``.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import common
import refold
from refold.bench import measure
from refold.dense import load_encoder
from refold.dense.building import BACKBONE, build
from refold.dense.cache import CachedEncoder
from refold.preprocessing import Preprocessing

RESULTS = common.RESULTS / "dense-memory"
PAGE = Path(__file__).parent.parent / "docs" / "dense.md"
START, END = "<!-- memory: written by `python benchmarks/dense_memory.py`; do not edit -->", "<!-- /memory -->"
#: Backbone, task, decoder, (height, width). The paper's are the last three: COCO, VOC and ADE20K.
MODELS = [
    ("swin_tiny_patch4_window7_224", "instance", "mask_rcnn", (800, 1344)),
    ("swin_base_patch4_window7_224", "instance", "cascade_mask_rcnn", (800, 1344)),
    ("swin_large_patch4_window7_224", "detect", "retinanet", (608, 1024)),
    ("swin_large_patch4_window7_224", "segment", "upernet", (512, 512)),
]
#: The one that shall fit 11 GB.
GOAL = ("swin_large_patch4_window7_224", "instance", "cascade_mask_rcnn", (800, 1344))
METHODS: dict[str, refold.Method] = {
    "frozen": refold.LinearProbe(),
    "E3VA": refold.E3VA(),
    "E3VA, taps recomputed": refold.E3VA(recompute="taps"),
    "E3VA, nothing recomputed": refold.E3VA(recompute="nothing"),
    "RepAdapter": refold.RepAdapter(),
    "full": refold.FullFineTune(),
}
NAMES = ("frozen", "E3VA, taps recomputed", "E3VA", "E3VA, nothing recomputed", "LoRA (PEFT)", "RepAdapter", "full")
CACHED = {"E3VA": "E3VA, cached", "E3VA, nothing recomputed": "E3VA, nothing recomputed, cached"}
MEASURED = (*NAMES[:3], CACHED["E3VA"], *NAMES[3:])  # whose memory is
KINDS = ("activations", "weights", "gradients", "optimizer")
TIMED = ("swin_tiny_patch4_window7_224", "swin_base_patch4_window7_224")
TIME_SIZE, TIME_BATCH, ROUNDS = (256, 256), 2, 7


def prepared(name: str, body: nn.Module) -> None:
    """Put the method called ``name`` on a backbone."""
    if name == "LoRA (PEFT)":
        from peft import LoraConfig, inject_adapter_in_model

        body.requires_grad_(False)
        inject_adapter_in_model(LoraConfig(r=8, lora_alpha=8, target_modules=["qkv"]), body)
    else:
        refold.attach(body, METHODS[name.removesuffix(", cached")], trainable=())


def model_of(backbone: str, task: str, decoder: str, size: tuple[int, int], name: str) -> nn.Module:
    torch.manual_seed(0)
    loaded = load_encoder(f"timm/{backbone}", pretrained=False)
    shape = Preprocessing(size=size, mean=loaded.preprocessing.mean, std=loaded.preprocessing.std)
    model = build(task, decoder, loaded, shape, [f"class {k}" for k in range(20)])
    prepared(name, model.get_submodule(BACKBONE[task]))
    return model.train()


def training_forward(model: nn.Module, task: str, size: tuple[int, int]) -> Callable[[], Tensor]:
    """The loss of one image, or of two for UPerNet, which normalises over the batch."""
    generator = torch.Generator().manual_seed(0)
    height, width = size
    if task == "segment":
        images = torch.randn(2, 3, height, width, generator=generator)
        masks = torch.randint(0, 20, (2, height, width), generator=generator)
        return lambda: nn.functional.cross_entropy(model(images), masks)
    corners = torch.rand(8, 2, generator=generator) * torch.tensor([width - 200.0, height - 200.0])
    boxes = torch.cat([corners, corners + 40 + 150 * torch.rand(8, 2, generator=generator)], dim=1)
    target = {"boxes": boxes, "labels": torch.randint(1, 21, (8,), generator=generator)}
    if task == "instance":
        target["masks"] = torch.zeros(8, height, width, dtype=torch.uint8)
        for mask, (x0, y0, x1, y1) in zip(target["masks"], boxes.long().tolist(), strict=True):
            mask[y0:y1, x0:x1] = 1
    image = torch.rand(3, height, width, generator=generator)
    return lambda: torch.stack(list(model([image], [target]).values())).sum()


def later_forward(
    forward: Callable[[], Tensor], encoder: nn.Module, size: tuple[int, int], batch: int
) -> Callable[[], Tensor]:
    """The same forward in an epoch after the first: its batch's features are made here and read from then on."""
    keys = [(k, 0) for k in range(batch)]
    cached = CachedEncoder(encoder, [str(k) for k, _ in keys], [size] * batch, dtype="float32")

    def served() -> Tensor:
        with cached.serving(keys):
            return forward()

    with torch.no_grad():
        served()
    return served


def memory(backbone: str, task: str, decoder: str, size: tuple[int, int], name: str) -> dict[str, Any]:
    path = RESULTS / f"{backbone}-{decoder}-{common.slug(name)}.json"
    if path.exists():
        return json.loads(path.read_text())
    batch = 2 if task == "segment" else 1
    model = model_of(backbone, task, decoder, size, name)
    forward = training_forward(model, task, size)
    if name in CACHED.values():
        forward = later_forward(forward, model.get_submodule(BACKBONE[task].removesuffix(".body")), size, batch)
    stored = measure.stored_bytes(forward, model)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    part = [p for p in model.get_submodule(BACKBONE[task]).parameters() if p.requires_grad]
    # To run the model again its images are kept, which autograd does not see.
    images = 4 * batch * 3 * math.prod(size) if name == "E3VA, taps recomputed" else 0
    record = {
        "backbone": backbone,
        "decoder": decoder,
        "size": size,
        "batch": batch,
        "method": name,
        "activations": stored.activations + images,
        "weights": 4 * sum(p.numel() for p in model.parameters()),
        "gradients": 4 * trainable,
        "optimizer": 8 * trainable,
        "backbone_parameters": sum(p.numel() for p in part),
        "environment": measure.environment(),
    }
    record["total"] = sum(record[kind] for kind in KINDS)
    RESULTS.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(f"{backbone} {decoder} {name}: {record['total'] / 2**20:,.0f} MiB", flush=True)
    return record


def time(backbone: str) -> dict[str, Any]:
    """Forward and backward of the encoder, every candidate beside full tuning; the forward alone is the limit."""
    path = RESULTS / f"time-{backbone}.json"
    if path.exists():
        return json.loads(path.read_text())
    images = torch.randn(TIME_BATCH, 3, *TIME_SIZE)
    keys = [(k, 0) for k in range(TIME_BATCH)]
    functions: dict[str, Callable[[], object]] = {}
    for name in NAMES[1:]:
        encoder = load_encoder(f"timm/{backbone}", pretrained=False, image_size=TIME_SIZE).encoder
        prepared(name, encoder.body)
        encoder.train()

        def step(encoder: nn.Module = encoder) -> None:
            torch.stack([one.square().mean() for one in encoder(images)]).sum().backward()
            encoder.zero_grad(set_to_none=True)

        functions[name] = step
        if name in CACHED:
            files = [str(k) for k in range(TIME_BATCH)]
            cached = CachedEncoder(encoder, files, [TIME_SIZE] * TIME_BATCH, dtype="float32")

            def later(cached: CachedEncoder = cached, step: Callable[[], None] = step) -> None:
                with cached.serving(keys):
                    step()

            functions[CACHED[name]] = later
    plain = load_encoder(f"timm/{backbone}", pretrained=False, image_size=TIME_SIZE).encoder
    functions["forward alone"] = torch.no_grad()(lambda: plain(images))
    timings = measure.latency(functions, rounds=ROUNDS, warmup=1)
    ratios = {name: timings.ratio(name, "full") for name in functions if name != "full"}
    cached_ratios = {later: timings.ratio(later, name) for name, later in CACHED.items()}
    record = {
        "backbone": backbone,
        "size": TIME_SIZE,
        "seconds": {name: timings[name].median for name in functions},
        "ratio": {name: [ratio.value, ratio.low, ratio.high] for name, ratio in ratios.items()},
        "cached": {name: [ratio.value, ratio.low, ratio.high] for name, ratio in cached_ratios.items()},
        "environment": measure.environment(),
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")
    return record


def report() -> None:
    records = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))]
    text = []
    for backbone, _, decoder, size in [*MODELS, GOAL]:
        mine = {r["method"]: r for r in records if r.get("decoder") == decoder and r["backbone"] == backbone}
        if "frozen" not in mine:
            continue
        rows = []
        for name in filter(mine.__contains__, MEASURED):
            one = mine[name]
            cells = [f"{one[kind] / 2**20:,.0f}" for kind in (*KINDS, "total")]
            others = [mine.get(other) for other in ("frozen", "full")]
            ratios = [f"{one['total'] / other['total']:.2f}" if other else "–" for other in others]
            rows.append((name, f"{one['backbone_parameters']:,}", *cells, *ratios))
        header = ("method", "trained in the backbone", "activations", "weights", "gradients", "AdamW", "all")
        title = f"**{backbone}, {decoder}**, {size[0]} x {size[1]}, batch {mine['frozen']['batch']}, MiB"
        text.append(f"{title}\n\n{common.markdown((*header, '/ frozen', '/ full'), rows)}")
    for record in (r for r in records if "ratio" in r):
        shown = {name: f"{v:.2f} ({low:.2f} to {high:.2f})" for name, (v, low, high) in record["ratio"].items()}
        for name, (v, low, high) in record["cached"].items():
            shown[name] += f"; of the same uncached {v:.2f} ({low:.2f} to {high:.2f})"
        rows = list(shown.items())
        title = f"**{record['backbone']}**, forward and backward of the backbone's part beside full fine-tuning"
        text.append(f"{title}\n\n{common.markdown(('method', 'time / full'), rows)}")
    if not text:
        return
    page = PAGE.read_text()
    before, _, rest = page.partition(START)
    PAGE.write_text(f"{before}{START}\n\n" + "\n\n".join(text) + f"\n\n{END}{rest.partition(END)[2]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=["memory", "time", "report", []], default=[], help="all if none")
    parser.add_argument("--only", default="", help="backbones whose names begin so")
    arguments = parser.parse_args()
    parts = arguments.parts or ["memory", "time", "report"]
    if "memory" in parts:
        for model in MODELS:
            for name in MEASURED if model[0].startswith(arguments.only) else ():
                memory(*model, name)
        for name in MEASURED[:4] if GOAL[0].startswith(arguments.only) else ():
            memory(*GOAL, name)
    if "time" in parts:
        for backbone in TIMED:
            if backbone.startswith(arguments.only):
                time(backbone)
    if "report" in parts:
        report()


if __name__ == "__main__":
    main()
