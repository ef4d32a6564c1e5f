"""What several commands share: the options' texts, and how a method is named."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from refold.errors import DataError, SiteError
from refold.methods import METHODS, Compose, Method

if TYPE_CHECKING:
    from refold.segmentation import Inference

__all__ = [
    "BACKBONE",
    "Adapter",
    "Augment",
    "BatchSize",
    "Data",
    "Decoder",
    "Epochs",
    "Features",
    "Flip",
    "Force",
    "HeadRate",
    "ImageSize",
    "LearningRate",
    "Model",
    "Precision",
    "Pretrained",
    "Resume",
    "Scales",
    "Seed",
    "Select",
    "ShortSide",
    "Split",
    "Stride",
    "Target",
    "Task",
    "TestList",
    "TrainList",
    "ValList",
    "Views",
    "Weights",
    "Window",
    "parse_inference",
    "parse_method",
    "parse_numbers",
]

#: The backbone of commands that train, unless another is named.
BACKBONE = "timm/vit_base_patch16_224.augreg_in21k"

Adapter = Annotated[
    str,
    typer.Argument(help="A run folder, an adapter file, or hf-hub:user/repo.", metavar="ADAPTER", show_default=False),
]
Weights = Annotated[
    Path | None,
    typer.Option(help="Local checkpoint of the backbone (.safetensors, .npz, .pth), instead of its published weights."),
]
Force = Annotated[
    bool,
    typer.Option("--force", help="Load the adapter although the backbone's weights are not those it was trained on."),
]
Data = Annotated[
    str,
    typer.Argument(
        help="A folder with a folder per class, a CSV, VTAB-style lists, or packaged/elpv, packaged/textile. With "
        "--task segment a folder of images and masks (images/ and masks/, ADE20K, VOC, Cityscapes); with detect and "
        "instance a COCO file or folder, or VOC XML. To try: packaged/shapes, packaged/nuclei, packaged/trees.",
        metavar="DATA",
    ),
]
Task = Annotated[
    str | None,
    typer.Option(
        help="segment (a class for each pixel), detect (boxes) or instance (boxes and masks); whole images if not "
        "given."
    ),
]
Decoder = Annotated[
    str | None,
    typer.Option(
        help="What is around the backbone. segment: upernet (default), fpn, dpt, segformer, linear, and for a ViT "
        "setr_naive, setr_pup, setr_mla; detect: faster_rcnn (default), cascade_rcnn, retinanet, fcos; instance: "
        "mask_rcnn (default), cascade_mask_rcnn."
    ),
]
Features = Annotated[
    str | None,
    typer.Option(
        help="Dense tasks with E3VA, LST or LinearProbe: compute what the frozen backbone gives once, and keep it in "
        "'memory' or a folder, which later runs take up again.",
        metavar="memory|FOLDER",
    ),
]
Views = Annotated[int, typer.Option(help="With --features: augmented views of a training image, shown in turn.")]
Model = Annotated[str, typer.Option("--model", "-m", help="Backbone spec; see `refold models`.")]
TrainList = Annotated[str | None, typer.Option("--train", help="Explicit training split, relative to DATA.")]
ValList = Annotated[str | None, typer.Option("--val", help="Explicit validation split.")]
TestList = Annotated[str | None, typer.Option("--test", help="Explicit test split.")]
Target = Annotated[str | None, typer.Option(help="Target column of a CSV.")]
Split = Annotated[
    tuple[float, float, float],
    typer.Option(help="Shares (or counts) of train, val and test where DATA has no splits of its own."),
]
Epochs = Annotated[int, typer.Option(help="Passes over the training images.")]
BatchSize = Annotated[
    int | None,
    typer.Option(help="Images a step, over all processes; 64, to segment 16, for objects 2 if not given."),
]
LearningRate = Annotated[float, typer.Option("--lr", help="Peak learning rate of the adapter.")]
HeadRate = Annotated[float | None, typer.Option("--head-lr", help="Peak rate of the head; as --lr if not given.")]
Augment = Annotated[
    str,
    typer.Option(
        help="Whole images: none, flip, light, randaugment, or a timm preset such as rand-m7-n4. Masks: none, flip, "
        "standard. Boxes: none, hflip, flip, light, lsj."
    ),
]
Precision = Annotated[str, typer.Option(help="auto, fp32 or bf16.")]
Pretrained = Annotated[bool, typer.Option("--pretrained/--random-weights", help="Backbone weights.")]
ImageSize = Annotated[int | None, typer.Option(help="Side of the model's input in pixels.")]
Select = Annotated[str | None, typer.Option(help="Validation metric that chooses the best epoch.")]
Seed = Annotated[int, typer.Option(help="Of the split, the order, augmentation, dropout and initialisation.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from the run folder's last checkpoint.")]


Window = Annotated[
    int | None, typer.Option(help="Segmentation: side in pixels of a window that slides over the image.")
]
Stride = Annotated[int | None, typer.Option(help="Segmentation: pixels between windows; two thirds if not given.")]
Scales = Annotated[
    list[float] | None, typer.Option("--scale", help="Segmentation: resize by this factor; several are averaged.")
]
Flip = Annotated[bool, typer.Option("--flip", help="Segmentation: average with the mirrored image.")]
ShortSide = Annotated[
    int | None,
    typer.Option(help="Segmentation: resize the shorter side to so many pixels; 0 keeps the image's size."),
]


def parse_inference(window: int | None, stride: int | None, scales: list[float] | None, flip: bool) -> Inference | None:
    """How a segmenter looks at images; None where no option was given.

    Raises:
        DataError: a size, stride or scale that is not positive, or a stride beyond the window.
    """
    if window is None and stride is None and not scales and not flip:
        return None
    from refold.segmentation import Inference

    return Inference(
        window=None if window is None else (window, window),
        stride=None if stride is None else (stride, stride),
        scales=tuple(scales or (1.0,)),
        flip=flip,
    )


def parse_numbers(text: str, where: str) -> list[int]:
    """``"0,1,2"`` as numbers.

    Args:
        where: the option that had the text, for errors.

    Raises:
        DataError: it is something else.
    """
    numbers = [number.strip() for number in text.split(",")]
    if not all(number.isdecimal() for number in numbers):
        raise DataError(f"must be whole numbers with commas between, not {text!r}", where=where)
    return [int(number) for number in numbers]


def parse_method(text: str, where: str = "--method") -> Method:
    """``"RepAdapter"``, ``"RepAdapter(rank=8, scale=5)"`` or ``"VPT + LoRA"`` as a method; class names in any case.

    Args:
        where: the option or argument that had the text, for errors.

    Raises:
        SiteError: an unknown name, a misspelt or invalid hyper-parameter, or text that is no call.
    """
    try:
        call = ast.parse(text.strip(), mode="eval").body
    except SyntaxError as problem:
        raise _unreadable(text, where) from problem
    if isinstance(call, ast.BinOp) and isinstance(call.op, ast.Add):
        return Compose([parse_method(ast.unparse(side), where) for side in (call.left, call.right)])
    if isinstance(call, ast.Name):
        call = ast.Call(func=call, args=[], keywords=[])
    if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.args:
        raise _unreadable(text, where)
    names = {name.lower(): name for name in METHODS}
    if call.func.id.lower() not in names:
        raise SiteError(f"unknown method {call.func.id!r}", where=where, remedy=f"Known: {', '.join(METHODS)}")
    values: dict[str, Any] = {}
    for keyword in call.keywords:
        if keyword.arg is None:
            raise _unreadable(text, where)
        try:
            values[keyword.arg] = ast.literal_eval(keyword.value)
        except ValueError as problem:
            raise _unreadable(text, where) from problem
    return METHODS[names[call.func.id.lower()]].from_json(values)


def _unreadable(text: str, where: str) -> SiteError:
    return SiteError(f"cannot read {text!r}", where=where, remedy="Write for example 'RepAdapter(rank=8, scale=5)'")
