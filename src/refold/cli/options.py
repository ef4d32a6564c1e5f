"""What several commands share: the options' texts, and how a method is named."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from refold.calls import read_call
from refold.errors import DataError, SiteError
from refold.methods import METHODS, Compose, Method

if TYPE_CHECKING:
    from refold.segmentation import Inference
    from refold.sweeps import RayEngine

__all__ = [
    "BACKBONE",
    "Accumulate",
    "Adapter",
    "Address",
    "Augment",
    "BatchSize",
    "CheckpointEvery",
    "ClassNames",
    "Clips",
    "Cpus",
    "Crops",
    "Data",
    "Decoder",
    "Engine",
    "Epochs",
    "Features",
    "Flip",
    "Fold",
    "Force",
    "FrameStride",
    "Frames",
    "Gpus",
    "Head",
    "HeadRate",
    "ImageSize",
    "LearningRate",
    "Model",
    "Optimizer",
    "Precision",
    "Pretrained",
    "Resume",
    "Sampling",
    "Scales",
    "Seed",
    "Select",
    "ShortSide",
    "Split",
    "Stride",
    "Target",
    "Task",
    "Templates",
    "TestList",
    "TrainList",
    "ValList",
    "Views",
    "Weights",
    "Window",
    "parse_engine",
    "parse_inference",
    "parse_method",
    "parse_numbers",
    "parse_pairs",
    "require_engine",
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
        help="A folder with a folder per class, a CSV, VTAB-style lists, WebDataset shards (a folder, or "
        "'train-{0000..0099}.tar'), a streamed Hugging Face data set (hf-dataset:NAME), or packaged/elpv, "
        "packaged/textile. With "
        "--task segment a folder of images and masks (images/ and masks/, ADE20K, VOC, Cityscapes); with detect and "
        "instance a COCO file or folder, or VOC. To try: packaged/shapes, packaged/nuclei, packaged/trees. With "
        "--task video a folder of videos: a folder per class, Kinetics, Something-Something v2, HMDB51, or lists.",
        metavar="DATA",
    ),
]
Task = Annotated[
    str | None,
    typer.Option(
        help="segment (a class for each pixel), detect (boxes), instance (boxes and masks) or video; whole images if "
        "not given."
    ),
]
Decoder = Annotated[
    str | None,
    typer.Option(
        help="What is around the backbone. segment: upernet (default), fpn, dpt, segformer, linear, and for a ViT "
        "setr_naive, setr_pup, setr_mla; detect: faster_rcnn (default), cascade_rcnn, retinanet, fcos; instance: "
        "mask_rcnn (default), cascade_mask_rcnn. With settings: 'fpn(width=64)', 'mask_rcnn(channels=64, rois=64)'. "
        "DenseCLIP: \"pixel_text(text='open_clip/NAME/PRETRAINED', decoder='fpn')\"."
    ),
]
Features = Annotated[
    str | None,
    typer.Option(
        help="With E3VA, LST or LinearProbe, on images: compute what the frozen backbone gives once, and keep it in "
        "'memory' or a folder, which later runs take up again. Whole images: '--features features/ --augment light "
        "--views 4'.",
        metavar="memory|FOLDER",
    ),
]
Views = Annotated[int, typer.Option(help="With --features: augmented views of a training image, shown in turn.")]
Head = Annotated[
    str,
    typer.Option(
        help="linear; of an open_clip model also zeroshot (starts from its text embeddings of the class names) and "
        "text (the text tower is adapted as well, and computes them at each step)."
    ),
]
Templates = Annotated[
    list[str] | None,
    typer.Option(
        "--template",
        help="Image-text models: a sentence with {} for a class name, several are averaged; 'a photo of a {}.' if not "
        "given. openai and simple stand for CLIP's 80 and its 7 for ImageNet.",
        metavar="TEXT",
    ),
]
ClassNames = Annotated[
    Path | None,
    typer.Option(help="Names for prompts: a CSV of lines CLASS,NAME; else as the data say, _ read as a space."),
]
Frames = Annotated[
    int | None, typer.Option(help="Videos: frames of a clip; what the model was made for, or 8, if not given.")
]
Sampling = Annotated[
    str,
    typer.Option(
        help="Videos: uniform (frames from equal parts of all of it), dense (a window in time, --stride frames of "
        "1/30 second apart) or strided (every --stride-th frame of the file)."
    ),
]
FrameStride = Annotated[int, typer.Option("--stride", help="Videos: frames from one of a clip to the next.")]
Clips = Annotated[
    int | None, typer.Option(help="Videos: clips of each that are averaged when it is scored; what the run had, or 1.")
]
Crops = Annotated[
    int | None, typer.Option(help="Videos: crops of each clip that are averaged, 1 or 3; what the run had, or 1.")
]
Fold = Annotated[int, typer.Option(help="HMDB51: which of its three official splits.")]
Model = Annotated[str, typer.Option("--model", "-m", help="Backbone spec; see `refold models`.")]
TrainList = Annotated[
    str | None, typer.Option("--train", help="Explicit training split, relative to DATA, or its name in hf-dataset.")
]
ValList = Annotated[str | None, typer.Option("--val", help="Explicit validation split.")]
TestList = Annotated[str | None, typer.Option("--test", help="Explicit test split.")]
Target = Annotated[str | None, typer.Option(help="Target column of a CSV or hf-dataset, or field of JSON in shards.")]
Split = Annotated[
    tuple[float, float, float],
    typer.Option(help="Shares (or counts) of train, val and test where DATA has no splits of its own."),
]
Epochs = Annotated[int, typer.Option(help="Passes over the training images.")]
BatchSize = Annotated[
    int | None,
    typer.Option(help="Images a step, over all processes; 64 (to segment and videos 16, objects 2) if not given."),
]
Accumulate = Annotated[
    int, typer.Option(help="Equal parts of a step's images that are computed one after the other, in less memory.")
]
CheckpointEvery = Annotated[
    int | None,
    typer.Option(help="Steps between two checkpoints, from which --resume goes on; at ends of epochs if not given."),
]
Optimizer = Annotated[str, typer.Option(help="adamw, or sgd with momentum 0.9, for example with --lr 0.1.")]
LearningRate = Annotated[float, typer.Option("--lr", help="Peak learning rate of the adapter.")]
HeadRate = Annotated[float | None, typer.Option("--head-lr", help="Peak rate of the head; as --lr if not given.")]
Augment = Annotated[
    str,
    typer.Option(
        help="Whole images: none, flip, light, randaugment, or a timm preset such as rand-m7-n4. Masks: none, flip, "
        "standard. Boxes: none, hflip, flip, light, lsj. Videos: none, crop, randaugment, or a policy such as "
        "rand-m7-n4, each also with +flip."
    ),
]
Precision = Annotated[str, typer.Option(help="auto, fp32 or bf16.")]
Pretrained = Annotated[bool, typer.Option("--pretrained/--random-weights", help="Backbone weights.")]
ImageSize = Annotated[int | None, typer.Option(help="Side of the model's input in pixels.")]
Select = Annotated[str | None, typer.Option(help="Validation metric that chooses the best epoch.")]
Seed = Annotated[int, typer.Option(help="Of the split, the order, augmentation, dropout and initialisation.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from the run folder's last checkpoint.")]


Engine = Annotated[str, typer.Option(help="sequential, or ray: many at once, on this machine or a cluster.")]
Address = Annotated[
    str | None,
    typer.Option(
        help="Ray: a cluster this machine belongs to, such as auto or 10.0.0.1:6379; this machine alone if not given.",
        metavar="HOST:PORT",
    ),
]
Cpus = Annotated[int | None, typer.Option(help="Ray: cores of one training; 1 if not given.")]
Gpus = Annotated[
    float | None, typer.Option(help="Ray: GPUs of one training, or a part of one; one where there is any if not given.")
]

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


def parse_engine(engine: str, address: str | None, cpus: int | None, gpus: float | None) -> RayEngine | None:
    """What trains many at once; None trains one after the other.

    Raises:
        DataError: an unknown engine, or options of Ray without it.
    """
    require_engine(engine, {"--address": address, "--cpus": cpus, "--gpus": gpus})
    if engine == "sequential":
        return None
    from refold.sweeps import RayEngine

    return RayEngine(address=address, cpus=1 if cpus is None else cpus, gpus=gpus)


def require_engine(engine: str, of_ray: dict[str, object]) -> None:
    """Raise :class:`DataError` for an unknown engine, or for options of Ray that are given without it."""
    if engine not in ("sequential", "ray"):
        raise DataError(f"must be sequential or ray, not {engine!r}", where="--engine")
    for name, value in of_ray.items():
        if value is not None and engine != "ray":
            raise DataError("is for --engine ray", where=name, remedy="Add it, or leave this out")


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


def parse_pairs(texts: list[str], where: str) -> dict[str, str]:
    """``NAME=PATH`` texts as names and paths.

    Args:
        where: the option that had the texts, for errors.

    Raises:
        DataError: one is something else, or a name is there twice.
    """
    found: dict[str, str] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not (name and equals and value) or name in found:
            raise DataError(f"cannot read {text!r}", where=where, remedy="Write NAME=PATH, each name once")
        found[name] = value
    return found


def parse_method(text: str, where: str = "--method") -> Method:
    """``"RepAdapter"``, ``"RepAdapter(rank=8, scale=5)"`` or ``"VPT + LoRA"`` as a method; class names in any case.

    Args:
        where: the option or argument that had the text, for errors.

    Raises:
        SiteError: an unknown name, a misspelt or invalid hyper-parameter, or text that is no call.
    """
    try:
        parsed = ast.parse(text.strip(), mode="eval").body
        if isinstance(parsed, ast.BinOp) and isinstance(parsed.op, ast.Add):
            return Compose([parse_method(ast.unparse(side), where) for side in (parsed.left, parsed.right)])
        called, values = read_call(text)
    except (SyntaxError, ValueError) as problem:
        raise SiteError(
            f"cannot read {text!r}", where=where, remedy="Write for example 'RepAdapter(rank=8, scale=5)'"
        ) from problem
    names = {name.lower(): name for name in METHODS}
    if called.lower() not in names:
        raise SiteError(f"unknown method {called!r}", where=where, remedy=f"Known: {', '.join(METHODS)}")
    return METHODS[names[called.lower()]].from_json(values)
