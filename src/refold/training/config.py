"""Settings of one run: plain, frozen, checked where they are made, the same in Python, JSON and the CLI."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from refold.errors import DataError
from refold.methods import METHODS, Method, method_from_json
from refold.training.recipe import Recipe

__all__ = ["TrainConfig", "require_fixed"]

#: Settings that may differ when a run is resumed: where it lies and how fast images are decoded.
FREE_SETTINGS = ("output", "workers", "cache", "features", "checkpoint_every")
RUN_FACTS = ("environment", "command")  # what config.json holds beside the settings
DENSE_TASKS = ("segment", "detect", "instance")
BATCH_SIZES = {"segment": 16, "detect": 2, "instance": 2, "video": 16}
HEADS = ("linear", "zeroshot", "text")
NORMALIZATIONS = ("model", "imagenet", "inception", "none")
SAMPLINGS = ("uniform", "dense", "strided")
#: Settings of videos, and what they are for everything else.
VIDEO_SETTINGS = {"frames": None, "sampling": "uniform", "stride": 4, "clips": 1, "crops": 1, "fold": 1}

#: Why a setting does not go with cached features.
DRAWS_ANEW = "draws anew at every step, and cached features are computed once"


def require_fixed(recipe: Recipe) -> None:
    """Raise :class:`DataError` for a setting that does not go with cached features."""
    for name in ("mixup", "cutmix", "consistency"):
        if getattr(recipe, name):
            raise DataError(DRAWS_ANEW, where=name, remedy="Leave it out, or train without features")


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Recipe):
    """Settings of :func:`refold.train`: the :class:`Recipe`, the model, the data and the run folder.

    Attributes:
        data: a folder, CSV, list, shards or stream, as :func:`refold.data.load_dataset` understands it; of a dense task
            as :func:`refold.segmentation.load_masks` and :func:`refold.detection.load_boxes` do, and of videos as
            :func:`refold.video.load_videos`.
        task: ``"segment"``, ``"detect"``, ``"instance"`` or ``"video"``; None learns whole images, as the data say:
            classes, labels or numbers.
        decoder: what is around the backbone in a dense task, see :data:`refold.dense.building.TASKS`; None is UPerNet,
            Faster R-CNN and Mask R-CNN.
        train, val, test: explicit split lists, relative to ``data``.
        target: target column of a CSV or stream, or field of the shards' JSON.
        fractions: shares, or counts, of train, validation and test where no explicit split is given; None, once,
            takes all the rest.
        skip_bad_images: leave out files that cannot be decoded instead of stopping.
        cache: keep decoded images in memory: ``"auto"``, or see :func:`refold.data.load_dataset`.
        frames: of a clip of a video; None is what the model was made for, 8 for a backbone for images.
        sampling: which frames make a clip: ``"uniform"``, ``"dense"`` or ``"strided"``, see
            :mod:`refold.video.sampling`.
        stride: frames from one of a clip to the next, unless ``sampling`` is uniform.
        clips, crops: of a video, when the validation and the test set are scored at the end: probabilities of all its
            views are averaged. Crops are 1 or 3.
        fold: which of HMDB51's three official splits.
        model: backbone spec, such as ``"timm/vit_base_patch16_224"``; of videos see :func:`refold.video.load_video`.
        weights: local checkpoint for the backbone.
        pretrained: False starts from random backbone weights.
        head: of an image-text model (``open_clip/NAME/PRETRAINED``) with classes: ``"zeroshot"`` starts from the text
            embeddings of the class names, ``"text"`` keeps the text tower, to which the method's adapters go as well,
            and computes them anew at each step; ``"linear"``, of any backbone, is a fresh linear layer.
        freeze_head: leave the zero-shot head as it is.
        templates: sentences with ``{}`` for a class name; None is ``a photo of a {}.``.
        class_names: a CSV of lines ``CLASS,NAME``, for prompts; a class that is not in it is called as the data call
            it, ``_`` read as a space.
        in_chans: input channels; None means what the backbone was trained with.
        image_size: side of the model's input in pixels; None means the backbone's own.
        features: keep what a frozen backbone gives E3VA, LST or a linear probe, so that it sees each view of an image
            once: ``"memory"``, or a folder, which a later run with the same backbone takes up again. None runs the
            backbone at every step. Not for videos, nor with mixup, cutmix or consistency, which draw anew at each step.
        views: with ``features``, how many augmented views a training image has; epochs show them in turn.
        normalize: ``"model"`` (the backbone's own mean and std), ``"imagenet"``, ``"inception"``
            (inputs in [-1, 1]) or ``"none"`` (inputs in [0, 1]).
        crop: ``"squash"`` resizes straight to the input size (the VTAB recipe), ``"center"`` cuts the centre.
        drop_path: rate of stochastic depth in the backbone of whole images and videos; dense tasks have none. None is
            0.1, and 0 of videos and with ``features``, where it must be 0.
        batch_size: None is 64 whole images, 16 to segment, 16 videos, and 2 for objects, whose images and heads are
            large.
        method: how to adapt: an instance of one of :data:`refold.methods.METHODS`.
        start: adapter file of the same method on the same backbone, whose weights, head included, training starts
            from; None starts as the method does.
        output: run folder to write.
        evaluate_test: score the best epoch on the test split when there is one.
    """

    batch_size: int = cast(int, None)  # a number from construction on
    data: str
    task: str | None = None
    decoder: str | None = None
    train: str | None = None
    val: str | None = None
    test: str | None = None
    target: str | None = None
    fractions: tuple[float | None, float | None, float | None] = (0.8, 0.2, 0.0)
    skip_bad_images: bool = False
    cache: str = "auto"
    features: str | None = None
    views: int = 1
    frames: int | None = None
    sampling: str = "uniform"
    stride: int = 4
    clips: int = 1
    crops: int = 1
    fold: int = 1
    model: str
    weights: str | None = None
    pretrained: bool = True
    head: str = "linear"
    freeze_head: bool = False
    templates: tuple[str, ...] | None = None
    class_names: str | None = None
    in_chans: int | None = None
    image_size: int | None = None
    normalize: str = "model"
    crop: str = "squash"
    drop_path: float = cast(float, None)  # a number from construction on
    method: Method
    start: str | None = None
    output: str
    evaluate_test: bool = True

    def __post_init__(self) -> None:
        if self.batch_size is None:
            object.__setattr__(self, "batch_size", BATCH_SIZES.get(self.task or "", Recipe.batch_size))
        if self.drop_path is None:
            fixed = self.task is None and self.features is not None
            object.__setattr__(self, "drop_path", 0.0 if self.task == "video" or fixed else 0.1)
        super().__post_init__()
        for name in ("data", "train", "val", "test", "weights", "start", "output", "features", "class_names"):
            if isinstance(getattr(self, name), Path):
                object.__setattr__(self, name, str(getattr(self, name)))
        for name in ("data", "model", "output", "cache"):
            self._text(name)
        for name in ("decoder", "train", "val", "test", "target", "weights", "start", "features", "class_names"):
            self._text(name, optional=True)
        self._choice("task", (None, *DENSE_TASKS, "video"))
        if self.decoder is not None and self.task not in DENSE_TASKS:
            raise DataError("is for dense tasks", where="decoder", remedy=f"Set task to {', '.join(DENSE_TASKS)}")
        self._features()
        for name in ("skip_bad_images", "pretrained", "evaluate_test", "freeze_head"):
            if not isinstance(getattr(self, name), bool):
                raise DataError(f"must be true or false, not {getattr(self, name)!r}", where=name)
        self._integer("in_chans", least=1, optional=True)
        self._integer("image_size", least=1, optional=True)
        self._choice("normalize", NORMALIZATIONS)
        self._choice("crop", ("squash", "center"))
        self._number("drop_path", lambda v: 0 <= v < 1, "at least 0 and under 1")
        self._video()
        self._fractions()
        self._head()
        if not isinstance(self.method, Method):
            raise DataError(
                f"must be one of {', '.join(METHODS)}, not {self.method!r}",
                where="method",
                remedy="For example: refold.RepAdapter(rank=8)",
            )

    def _features(self) -> None:
        self._integer("views", least=1)
        if self.features is None:
            if self.views > 1:
                raise DataError("is for cached features", where="views", remedy="Set features")
            return
        if self.task == "video":
            raise DataError("is for images, not videos", where="features", remedy="Leave it out")
        require_fixed(self)
        if self.task is None and self.drop_path:
            raise DataError(DRAWS_ANEW, where="drop_path", remedy="Set it to 0, or leave features out")

    def _head(self) -> None:
        self._choice("head", HEADS)
        if self.head != "linear" and self.task is not None:
            raise DataError(
                f"{self.head!r} is for classes of whole images", where="head", remedy="Leave out head or task"
            )
        for name in ("templates", "class_names"):
            if self.head == "linear" and getattr(self, name) is not None:
                raise DataError("is for prompts", where=name, remedy="Set head to zeroshot or text")
        if self.freeze_head and self.head != "zeroshot":
            raise DataError(f"is for a zero-shot head, not {self.head!r}", where="freeze_head", remedy="Leave it out")
        if isinstance(self.templates, list):
            object.__setattr__(self, "templates", tuple(self.templates))

    def _video(self) -> None:
        self._choice("sampling", SAMPLINGS)
        self._integer("frames", least=1, optional=True)
        for name in ("stride", "clips"):
            self._integer(name, least=1)
        self._choice("crops", (1, 3))
        self._choice("fold", (1, 2, 3))
        for name, neutral in VIDEO_SETTINGS.items():
            if self.task != "video" and getattr(self, name) != neutral:
                raise DataError("is for videos", where=name, remedy="Set task to video")

    def _fractions(self) -> None:
        values = self.fractions
        if not isinstance(values, list | tuple) or len(values) != 3:
            raise DataError(f"must be three numbers, not {values!r}", where="fractions")
        for value in values:
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if value is not None and not (number and 0 <= value < math.inf):
                raise DataError(f"must be numbers of 0 or more, not {values!r}", where="fractions")
        given = [value for value in values if value is not None]
        if any(value > 1 for value in given):  # counts, which a command line may have made floats
            if any(value != int(value) for value in given):
                raise DataError(f"must be all shares or all counts, not {values!r}", where="fractions")
            values = [value if value is None else int(value) for value in values]
        object.__setattr__(self, "fractions", tuple(values))

    def to_json(self) -> dict[str, Any]:
        """Plain data, from which :meth:`from_json` makes an equal config."""
        data = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "method"}
        return json.loads(json.dumps({**data, "method": self.method.to_json()}))

    @classmethod
    def of(cls, **settings: Any) -> TrainConfig:
        """The same as the constructor, with its complaints about names as errors of refold.

        Raises:
            DataError: naming the field that is missing, unknown or out of range.
        """
        cls._known(settings, where="settings")
        for item in dataclasses.fields(cls):
            if item.default is dataclasses.MISSING and item.name not in settings:
                raise DataError("is missing", where=item.name)
        return cls(**settings)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> TrainConfig:
        """Rebuild from :meth:`to_json`.

        Raises:
            DataError: naming the field that is missing, unknown or out of range.
            SiteError: the method is unknown or invalid.
        """
        method = data.get("method")
        return cls.of(**(data | ({"method": method_from_json(method)} if isinstance(method, dict) else {})))

    @classmethod
    def load(cls, folder: str | Path) -> TrainConfig:
        """The config of an existing run folder.

        Raises:
            DataError: the folder has no readable ``config.json``.
        """
        path = Path(folder) / "config.json"
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise DataError(f"cannot be read ({error})", where=str(path), remedy="Is this a run folder?") from error
        if not isinstance(content, dict):
            raise DataError("holds no settings", where=str(path), remedy="Is this a run folder?")
        return cls.from_json({k: v for k, v in content.items() if k not in RUN_FACTS})
