"""Semantic segmentation: adapt a backbone to images with masks, score it, fold the adapter, write masks.

    python examples/segment.py                              # drawn shapes and packaged weights: works offline
    python examples/segment.py --data streets --model timm/convnext_tiny --image-size 512 --epochs 40

Data: `images/` and `masks/` (with `train`, `val` and `test` in both), or the layout of ADE20K, VOC or Cityscapes.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import refold
from refold.attachment import attached_part
from refold.segmentation import Inference
from refold.training import evaluate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="packaged/shapes")
    parser.add_argument("--model", default="packaged/efficientnet_lite0")
    parser.add_argument("--decoder", default="fpn")
    parser.add_argument("--image-size", type=int, default=96)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--predict", type=Path, help="images without masks to look at afterwards")
    parser.add_argument("--output", type=Path, default=Path("runs/segment"))
    arguments = parser.parse_args()

    result = refold.train(
        data=arguments.data,
        task="segment",
        decoder=arguments.decoder,
        model=arguments.model,
        method=refold.RepAdapter(rank=8),
        image_size=arguments.image_size,
        epochs=arguments.epochs,
        batch_size=arguments.batch_size,
        augment="flip",
        lr=3e-3,
        output=arguments.output,
    )
    for split, metrics in result.metrics.items():
        print(f"{split}: mIoU {metrics['miou']:.3f}, pixel accuracy {metrics['pixel_accuracy']:.3f}")
    mirrored = evaluate(arguments.output, split="val", inference=Inference(flip=True))
    print(f"val, averaged with the mirrored images: mIoU {mirrored.metrics['miou']:.3f}")

    # The adapters are in the backbone, a part of the model: the decoder around it is trained as it is.
    report = refold.merge(result.model.get_submodule(attached_part(result.model)))
    print(f"merged, relative difference {report.rel_l2:.1e}")
    print(f"pictures of the predictions: {arguments.output / 'overlays.png'}")
    if arguments.predict:
        refold.predict(arguments.output, arguments.predict, output=arguments.output / "predicted")


if __name__ == "__main__":
    main()
