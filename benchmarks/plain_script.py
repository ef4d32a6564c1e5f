"""One epoch on ELPV at 112 px, twice: the script a user would write today, and refold's training loop.

Both: ViT-S/14, 800 images, batch 32, flips both ways, rank-8 adapters on each block's qkv and fc1, AdamW,
bfloat16 autocast. The plain script is timm + PEFT LoRA + torchvision transforms + DataLoader with two workers,
which decodes every image in every epoch; refold decodes once, before. Neither time has what a run does once: the
plain script's model and optimizer are built before, and refold's attention kernel is chosen before.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import timm
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

import refold
from refold import data
from refold.training import Recipe, fit

SIZE, BATCH, RANK, COUNTS = 112, 32, 8, (800, 200, 1624)


def backbone() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("vit_small_patch14_dinov2", num_classes=2, img_size=SIZE)


class Images(Dataset):
    """What everybody writes: a list of files, opened and transformed one by one."""

    def __init__(self, paths: list[str], targets: list[int]) -> None:
        self.paths, self.targets = paths, targets
        self.transform = transforms.Compose(
            [
                transforms.Resize((SIZE, SIZE), transforms.InterpolationMode.BICUBIC),
                transforms.RandomHorizontalFlip(),
                transforms.RandomVerticalFlip(),
                transforms.ToTensor(),
                transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
            ]
        )

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = Image.open(Path(self.paths[index])).convert("RGB")
        return self.transform(image), self.targets[index]


def plain_epoch() -> Callable[[], None]:
    """A function that trains one epoch of the plain script each time it is called."""
    from peft import LoraConfig, get_peft_model

    splits = data.load_dataset("packaged/elpv", fractions=COUNTS)
    loader = DataLoader(
        Images([str(p) for p in splits.train.paths], splits.train.targets.tolist()),
        batch_size=BATCH,
        shuffle=True,
        num_workers=2,
        drop_last=True,
    )
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["qkv", "fc1"], modules_to_save=["head"])
    model = get_peft_model(backbone(), config).train()  # type: ignore[arg-type]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, weight_decay=1e-4)

    def run() -> None:
        for images, targets in loader:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = nn.functional.cross_entropy(model(images), targets)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    return run


def refold_epoch() -> Callable[[], None]:
    """The same epoch by ``refold.training.fit``: loader, optimizer and the casts of frozen weights included."""
    splits = data.load_dataset("packaged/elpv", fractions=COUNTS)
    model = refold.attach(backbone(), refold.RepAdapter(rank=RANK), example=torch.randn(1, 3, SIZE, SIZE))
    preprocessing = refold.Preprocessing(size=(SIZE, SIZE))
    recipe = Recipe(epochs=1, batch_size=BATCH, augment="flip", warmup_epochs=0)
    one_batch = splits.train.subset(range(BATCH))
    chosen = fit(model, one_batch, None, preprocessing, recipe, classes=splits.classes).attention
    recipe = replace(recipe, attention=chosen)

    def run() -> None:
        fit(model, splits.train, None, preprocessing, recipe, classes=splits.classes)

    return run
