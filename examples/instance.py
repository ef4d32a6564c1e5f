"""Instance segmentation: adapt a backbone to images with masks of objects, score it, fold the adapter where it folds.

    python examples/instance.py                             # drawn shapes and packaged weights: works offline
    python examples/instance.py --data coco --model timm/swin_base_patch4_window7_224 --image-size 800 \\
        --detector cascade_mask_rcnn --method E3VA --batch-size 2 --epochs 12

Data: a COCO file with masks, or a folder of them with `images/`. E3VA keeps nothing of the backbone for the backward
pass, so that a large one fits; it needs a backbone whose stages are joined by one module, as Swin's and ConvNeXt's.
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
    parser.add_argument("--detector", default="mask_rcnn", help="mask_rcnn or cascade_mask_rcnn")
    parser.add_argument("--method", default="RepAdapter", choices=refold.METHODS)
    parser.add_argument("--image-size", type=int, default=96, help="shorter side in pixels")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--output", type=Path, default=Path("runs/instance"))
    arguments = parser.parse_args()

    method = refold.METHODS[arguments.method]()
    result = refold.train(
        data=arguments.data,
        task="instance",
        decoder=arguments.detector,
        model=arguments.model,
        method=method,
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

    # The adapters are in the backbone, a part of the model: pyramid and heads around it are trained as they are.
    backbone = result.model.get_submodule(attached_part(result.model))
    if method.mergeable:
        print(f"merged, relative difference {refold.merge(backbone).rel_l2:.1e}")
    else:
        print(f"{method.describe()} stays beside the backbone")
    print(f"pictures of the predictions: {arguments.output / 'overlays.png'}")


if __name__ == "__main__":
    main()
