"""Adapt a transformers model with its own Trainer; refold only attaches before and merges after.

    python examples/transformers_trainer.py

A small ViT with random weights and synthetic images keeps the example offline and short; with the network,
``ViTForImageClassification.from_pretrained(...)`` takes its place. Needs ``refold[transformers]``.
"""

from __future__ import annotations

import argparse
import tempfile

import torch
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification

import refold


class Stripes(Dataset):
    """Horizontal or vertical stripes with noise: two classes that need no download."""

    def __init__(self, count: int, size: int) -> None:
        generator = torch.Generator().manual_seed(0)
        wave = torch.sin(torch.arange(size) * 0.8).expand(size, size)
        self.labels = torch.arange(count) % 2
        noise = torch.randn(count, 3, size, size, generator=generator)
        self.images = torch.stack([wave if label else wave.T for label in self.labels])[:, None] + 0.5 * noise

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"pixel_values": self.images[index], "labels": self.labels[index]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=3)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    config = ViTConfig(
        image_size=64, patch_size=8, hidden_size=64, num_hidden_layers=3, num_attention_heads=4, intermediate_size=128
    )
    model = ViTForImageClassification(config)
    refold.attach(model, refold.RepAdapter(rank=4))
    print(refold.explain(model))
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            folder,
            num_train_epochs=arguments.epochs,
            per_device_train_batch_size=16,
            learning_rate=3e-3,
            report_to=[],
            save_strategy="no",
            use_cpu=not torch.cuda.is_available(),
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        Trainer(model, settings, train_dataset=Stripes(128, 64)).train()
    report = refold.merge(model)
    print(f"merged {len(report.folded)} tensors, relative difference {report.rel_l2:.1e}")


if __name__ == "__main__":
    main()
