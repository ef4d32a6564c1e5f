"""What each method costs, counted on a backbone without values: parameters beside the head, and operations.

The backbone lives on torch's device "meta", where a forward computes shapes alone: a ViT-B/16 takes a tenth of a second
and no memory. Nothing is assumed about a method: it plans, builds and runs there as it does anywhere. Some plans try
a layer and look at numbers (VPT's does); these are made on the same backbone with random weights and a small image.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from refold import hosting
from refold.adapters import Adapter
from refold.bench.measure import count_operations
from refold.errors import MissingExtraError, SiteError
from refold.methods import Method, Plan
from refold.preparation import Prepared, build_adapters
from refold.survey import Survey

__all__ = ["BACKBONES", "Cost", "Shelf"]

#: timm name -> what the papers call it. A method is counted on the first of them in which it has a place.
BACKBONES = {"vit_base_patch16_224": "ViT-B/16", "resnet50": "ResNet-50"}
#: What makes them quick to run with numbers; their blocks stay the same.
_SMALL = {"vit_base_patch16_224": {"img_size": 32}, "resnet50": {}}
_NAME = "counted"


@dataclass(frozen=True)
class Cost:
    """A method on a backbone, with its head left out.

    Attributes:
        backbone: timm name.
        parameters: trainable values, shared ones counted once.
        share: ``parameters`` over the backbone's own.
        extra: operations that the adapters add to a forward while they are not merged, over those of the plain
            backbone; products and convolutions count, elementwise work does not. None if they were not counted.
        plan: the method's.
    """

    backbone: str
    parameters: int
    share: float
    extra: float | None
    plan: Plan


class Shelf:
    """Counts methods; each backbone is built and probed once.

    Raises:
        MissingExtraError: timm, which has the backbones, is not installed.
    """

    def __init__(self) -> None:
        try:
            import timm
        except ImportError as error:
            raise MissingExtraError("the package 'timm' is not installed", remedy="Run: pip install timm") from error
        self._create = timm.create_model
        self._surveys: dict[tuple[str, bool], Survey] = {}
        self._plain: dict[str, float] = {}

    def survey(self, backbone: str, *, filled: bool = False) -> Survey:
        """Of a backbone by its timm name, without a head.

        Args:
            filled: with random values on the CPU, and a small image, instead of shapes alone.
        """
        key = backbone, filled
        if key not in self._surveys:
            with torch.device("meta"):
                model = self._create(backbone, num_classes=0, **(_SMALL[backbone] if filled else {})).eval()
            if filled:
                _fill(model.to_empty(device="cpu"))
            self._surveys[key] = Survey(model, torch.zeros(1, 3, 32, 32) if filled else None)
        return self._surveys[key]

    def cost(self, method: Method, *, operations: bool = True) -> Cost:
        """What ``method`` costs on the first of :data:`BACKBONES` in which it has a place.

        Args:
            operations: count them too; a forward with the adapters is most of the time this takes.

        Raises:
            SiteError: it has none in any; the first refusal.
        """
        refused: list[SiteError] = []
        for backbone in BACKBONES:
            try:
                return self._on(backbone, method, operations)
            except SiteError as error:
                refused.append(error)
        raise refused[0]

    def _on(self, backbone: str, method: Method, operations: bool) -> Cost:
        survey = copy.copy(self.survey(backbone))  # a plan may ask for another example, such as whole clips
        model = survey.model
        try:
            plan = method.plan(survey)
        except RuntimeError:  # torch's, for asking a tensor without values for one
            plan = method.plan(self.survey(backbone, filled=True))
        adapters = build_adapters(model, Prepared(_NAME, method, plan, (), (), (), survey.example))
        trained = [p for adapter in adapters.values() for p in adapter.parameters()]
        trained += [model.get_parameter(name) for name in plan.trained]
        parameters = sum(p.numel() for p in {id(p): p for p in trained}.values())
        own = sum(p.numel() for p in model.parameters())
        extra = self._extra(backbone, survey, plan, adapters) if operations else None
        return Cost(backbone, parameters, parameters / own, extra, plan)

    def _extra(self, backbone: str, survey: Survey, plan: Plan, adapters: Mapping[str, Adapter]) -> float:
        if not plan.sites:
            return 0.0
        model, (images,) = survey.model, survey.example.args
        if backbone not in self._plain:
            self._plain[backbone] = count_operations(model, images) / len(images)
        for site in plan.sites:
            hosting.host(model, site, _NAME, adapters[site.key])
        try:
            hosting.activate_slots(model, _NAME)
            return count_operations(model, images) / len(images) / self._plain[backbone] - 1
        finally:
            hosting.unhost(model)


@torch.no_grad()
def _fill(model: nn.Module) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                tensor.uniform_(-0.1, 0.1).abs_() if tensor.dim() < 2 else tensor.uniform_(-0.1, 0.1)
            else:
                tensor.zero_()
