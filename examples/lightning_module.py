"""Adapt a timm model inside Lightning; refold attaches before, gives the parameter groups, and merges after.

    python examples/lightning_module.py

Packaged weights and images: works offline. Needs ``pip install lightning``.
"""

from __future__ import annotations

import argparse

import lightning
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import refold
from refold import backbones, data


class Classifier(lightning.LightningModule):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        images, targets = batch
        return F.cross_entropy(self.model(images), targets)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(refold.param_groups(self.model, lr=1e-3))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=64, help="training images")
    parser.add_argument("--epochs", type=int, default=1)
    arguments = parser.parse_args()
    lightning.seed_everything(0)
    splits = data.load_dataset("packaged/elpv", fractions=(arguments.images, 64, None))
    loaded = backbones.load("packaged/vit_small_focus", num_classes=2, image_size=112)
    model = refold.attach(loaded.model, refold.RepAdapter(rank=8))
    loader = data.Loader(splits.train, loaded.preprocessing, batch_size=16, augment="flip", shuffle=True)
    trainer = lightning.Trainer(
        max_epochs=arguments.epochs,
        accelerator="auto",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Classifier(model), train_dataloaders=loader)
    report = refold.merge(model)
    print(f"merged {len(report.folded)} tensors, relative difference {report.rel_l2:.1e}")


if __name__ == "__main__":
    main()
