"""Object detection: adapt a backbone to images with boxes, score it, fold the adapter, write what it finds.

    python examples/detect.py                               # drawn shapes and packaged weights: works offline
    python examples/detect.py --data coco --model timm/swin_tiny_patch4_window7_224 --image-size 640 --epochs 12

Data: a COCO file, a folder of them with `images/`, or VOC's XML files.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import refold
from refold.attachment import attached_part


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="packaged/shapes")
    parser.add_argument("--model", default="packaged/efficientnet_lite0")
    parser.add_argument("--detector", default="fcos", help="faster_rcnn, cascade_rcnn, retinanet or fcos")
    parser.add_argument("--image-size", type=int, default=128, help="shorter side in pixels")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--predict", type=Path, help="images without boxes to look at afterwards")
    parser.add_argument("--output", type=Path, default=Path("runs/detect"))
    arguments = parser.parse_args()

    result = refold.train(
        data=arguments.data,
        task="detect",
        decoder=arguments.detector,
        model=arguments.model,
        method=refold.RepAdapter(rank=8),
        image_size=arguments.image_size,
        epochs=arguments.epochs,
        batch_size=arguments.batch_size,
        augment="hflip",
        lr=1e-3,
        clip_grad=10.0,
        output=arguments.output,
    )
    for split, metrics in result.metrics.items():
        print(f"{split}: AP {metrics['ap']:.3f}, AP50 {metrics['ap50']:.3f}")

    # The adapters are in the backbone, a part of the model: pyramid and heads around it are trained as they are.
    report = refold.merge(result.model.get_submodule(attached_part(result.model)))
    print(f"merged, relative difference {report.rel_l2:.1e}")
    print(f"pictures of the predictions: {arguments.output / 'overlays.png'}")
    if arguments.predict:
        refold.predict(arguments.output, arguments.predict, output=arguments.output / "predicted")


if __name__ == "__main__":
    main()
