"""Segmentation and detection on one frozen backbone, an adapter for each task, switched and folded as needed.

    python examples/multitask.py                            # drawn shapes and packaged weights: works offline
    python examples/multitask.py --masks streets --boxes coco --model timm/convnext_tiny --image-size 512 --epochs 40

Data: masks as in `segment.py`, boxes as in `detect.py`; the two need not be of the same images.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import refold
from refold.dense import load_encoder
from refold.dense.job import load_labelled
from refold.dense.multitask import MultiTask, fit_tasks
from refold.detection import build_detector
from refold.segmentation import Segmenter
from refold.training import Recipe


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--masks", default="packaged/shapes")
    parser.add_argument("--boxes", default="packaged/shapes")
    parser.add_argument("--model", default="packaged/efficientnet_lite0")
    parser.add_argument("--image-size", type=int, default=128)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--output", type=Path, default=Path("runs/multitask"))
    arguments = parser.parse_args()

    size, shares = arguments.image_size, (0.8, 0.2, 0.0)
    parts = {
        "regions": load_labelled("segment", arguments.masks, fractions=shares),
        "objects": load_labelled("detect", arguments.boxes, fractions=shares),
    }
    loaded = load_encoder(arguments.model, image_size=size)
    detector = build_detector(
        "fcos", loaded.encoder, len(parts["objects"].classes), preprocessing=loaded.preprocessing,
        min_size=size, max_size=2 * size,
    )  # fmt: skip
    model = MultiTask({"regions": Segmenter(loaded.encoder, "fpn", len(parts["regions"].classes)), "objects": detector})
    # One method in place of the two would be one adapter for both.
    model.attach({"regions": refold.RepAdapter(rank=8), "objects": refold.LoRA(rank=8)})
    recipe = Recipe(epochs=arguments.epochs, batch_size=arguments.batch_size, augment="flip", lr=1e-3, clip_grad=10.0)
    solved = fit_tasks(model, parts, loaded.preprocessing, recipe)
    best = next(r for r in solved.history if r["split"] == "val" and r["epoch"] == solved.best_epoch)
    print(f"best epoch {best['epoch']}: mIoU {best['regions_miou']:.3f}, AP {best['objects_ap']:.3f}")

    arguments.output.mkdir(parents=True, exist_ok=True)
    files = model.save(arguments.output)
    print("files:", ", ".join(str(path) for path in files.values()))
    model.activate("objects")  # one adapter is folded at a time: the other takes its place when its task is called
    report = refold.merge(model.body)
    print(f"merged for objects, relative difference {report.rel_l2:.1e}")


if __name__ == "__main__":
    main()
