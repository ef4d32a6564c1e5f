"""Adapt, save, merge and use a backbone with nothing but a PyTorch loop.

    python examples/plain_pytorch.py

Packaged weights and images: works offline. Any timm, torchvision or own model takes the place of the backbone.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch.nn import functional as F

import refold
from refold import backbones, data


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=128, help="training images")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path("cells.safetensors"))
    arguments = parser.parse_args()
    torch.manual_seed(0)

    splits = data.load_dataset("packaged/elpv", fractions=(arguments.images, 64, None))
    assert splits.val is not None
    loaded = backbones.load("packaged/vit_small_focus", num_classes=2, image_size=112)
    model = refold.attach(loaded.model, refold.RepAdapter(rank=8))
    refold.describe(
        model, backbone=loaded.spec, classes=splits.classes, preprocessing=loaded.preprocessing, task="classify"
    )
    print(refold.explain(model))

    optimizer = torch.optim.AdamW(refold.param_groups(model, lr=1e-3))
    loader = data.Loader(splits.train, loaded.preprocessing, batch_size=32, augment="flip", shuffle=True)
    for epoch in range(arguments.epochs):
        model.train()
        loader.set_epoch(epoch)
        for images, targets in loader:
            loss = F.cross_entropy(model(images), targets)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        print(f"epoch {epoch + 1}: loss {float(loss):.3f}")

    refold.save(model, arguments.output)
    report = refold.merge(model)
    print(f"merged, relative difference {report.rel_l2:.1e}; adapter file {arguments.output.stat().st_size:,} bytes")

    model.eval()
    with torch.inference_mode():
        batches = data.Loader(splits.val, loaded.preprocessing, batch_size=32)
        hits = sum(int((model(images).argmax(1) == targets).sum()) for images, targets in batches)
    print(f"validation accuracy {hits / len(splits.val):.3f}")


if __name__ == "__main__":
    main()
