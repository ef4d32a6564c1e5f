"""Instance segmentation with E3VA: a highway beside a backbone that never runs backward, and Mask R-CNN on top.

    python examples/instance.py                             # drawn shapes and packaged weights: works offline
    python examples/instance.py --data coco --model timm/swin_base_patch4_window7_224 --image-size 800 \\
        --detector cascade_mask_rcnn --batch-size 2 --epochs 12

Data: a COCO file with masks, or a folder of them with `images/`. Prints what training held in memory.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import refold
from refold.training import resolve


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="packaged/shapes")
    parser.add_argument("--model", default="packaged/efficientnet_lite0")
    parser.add_argument("--detector", default="mask_rcnn", help="mask_rcnn or cascade_mask_rcnn")
    parser.add_argument("--image-size", type=int, default=96, help="shorter side in pixels")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--output", type=Path, default=Path("runs/instance"))
    arguments = parser.parse_args()

    result = refold.train(
        data=arguments.data,
        task="instance",
        decoder=arguments.detector,
        model=arguments.model,
        method=refold.E3VA(),
        image_size=arguments.image_size,
        epochs=arguments.epochs,
        batch_size=arguments.batch_size,
        augment="hflip",
        lr=5e-4,
        clip_grad=10.0,
        output=arguments.output,
    )
    for split, metrics in result.metrics.items():
        print(f"{split}: mask AP {metrics['mask_ap']:.3f}, box AP {metrics['box_ap']:.3f}")
    print(f"peak memory {result.summary['peak_memory'] / 1e9:.2f} GB")

    # E3VA stays beside the backbone and does not merge. The file holds all that was trained.
    backbone = resolve(arguments.output).backbone
    print(refold.explain(backbone))
    print(f"{result.adapter}: {result.adapter.stat().st_size:,} bytes")
    print(f"pictures of the predictions: {arguments.output / 'overlays.png'}")


if __name__ == "__main__":
    main()
