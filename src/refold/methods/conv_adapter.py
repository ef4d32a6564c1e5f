"""Conv-Adapter: "Exploring Parameter Efficient Transfer Learning for ConvNets" (arXiv 2208.07463).

    A(x) = gamma * (Up act(Down x + a) + b)

Down is a K x K convolution from d channels to h = d / reduction, each of its h filters on channels of its own, with
the stride, padding and dilation of what it runs beside; Up is pointwise; gamma is learned for each channel. The
four placements:

    position="conv_parallel"        y = f(x) + A(x)        around each convolution f of the backbone
    position="conv_sequential"      y = f(x) + A(f(x))
    position="residual_parallel"    y = block(x) + A(x)    around each block
    position="residual_sequential"  y = block(x) + A(block(x))

A convolution is every one over several positions but those that read the image: the 3 x 3 of ResNet's bottlenecks, the
depthwise ones of ConvNeXt and EfficientNet, ConvNeXt's down-sampling ones. K is its kernel, or the widest of the block;
7 in a block without one (Swin). For d inputs and e outputs A has d K^2 + h (e + 1) + 2 e parameters. With reduction=4
in parallel to convolutions that is 356,848 on ResNet-50 (1.5 % of its body; the paper says 3.5 %, which no reduction
from 4 to 16 gives here), 3,721,728 on ConvNeXt-B and 2,082,496 on EfficientNet-B0; beside the latter's blocks, 96,020.

The published start is not the backbone: gamma starts at one and no weight at zero. Here it is that of the released
ConvNeXt and Swin, truncated normals of std 0.02 and zero biases, near the backbone on all; the released ResNet starts
adapters like layers (Kaiming), far from it.

Without activation, parallel to a convolution that is not grouped, A folds: its weight gets gamma Up Down, its bias
gamma (Up a + b). A grouped one would become dense, and is left out, or refused where it was named. Both biases are left
out where the layer has none to receive them.

Deviations from the released code, on purpose: its ResNet adds A behind the norm and the activation of the convolution;
its EfficientNet uses 1 x 1 kernels beside blocks; its BasicBlock reads a variable before it is set, and does not run.
Its Swin is ``position="residual_parallel", sites="attention"``: A reads the attention's norm. Class and register tokens
are convolved alone, as images of one pixel. Layouts: (B, C, H, W), (B, H, W, C) and tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import nn

from refold import geometry
from refold.adapters import Adapter
from refold.adapters.nonlinear import ACTIVATIONS
from refold.adapters.separable import SeparableConv, SeparableKernel
from refold.errors import SiteError
from refold.methods.base import Method, Plan, is_count, require
from refold.methods.weight import check_usual, noted
from refold.places import block_site, block_sites, branch_site, branches, on_grid
from refold.probe import tensors_of
from refold.roles import ROLES
from refold.sites import Geometry, Layer, Site, Skipped
from refold.survey import Survey

__all__ = ["ConvAdapter"]

_POSITIONS = ("conv_parallel", "conv_sequential", "residual_parallel", "residual_sequential")


@dataclass(frozen=True)
class ConvAdapter(Method):
    """Small separable convolution beside or behind the convolutions, or the blocks, of a convolutional backbone.

    Args:
        reduction: channels for each filter of the first convolution; the paper's sizes are 4 to 16. Where it does not
            divide a width, the next larger divisor is taken, which ``explain`` tells.
        activation: between the two convolutions; ``"identity"`` merges exactly in ``position="conv_parallel"``.
        position: ``"conv_parallel"``, ``"conv_sequential"``, ``"residual_parallel"`` or ``"residual_sequential"``.
        sites: paths of convolutions, or of blocks and modules around them (``*`` allowed); roles such as
            ``"attention"`` for residual branches of transformers; None is every one.

    Raises:
        SiteError: a hyper-parameter is out of range.

    Use it on convolutional backbones, whose spatial filters the adapters made for transformers leave as they are.
    """

    reduction: int = 4
    activation: str = "relu"
    position: str = "conv_parallel"
    sites: tuple[str, ...] | str | None = None

    summary: ClassVar[str] = "separable convolution beside a ConvNet's convolutions or blocks"
    paper: ClassVar[str] = "arXiv 2208.07463"
    tasks: ClassVar[str] = "classification, detection, segmentation"
    folds: ClassVar[str] = "without activation, in parallel to dense convolutions"

    def __post_init__(self) -> None:
        check_usual(self)
        require(self, "reduction", is_count(self.reduction), "a positive integer")
        require(self, "activation", self.activation in ACTIVATIONS, f"one of {', '.join(ACTIVATIONS)}")
        require(self, "position", self.position in _POSITIONS, f"one of {', '.join(_POSITIONS)}")

    @property
    def mergeable(self) -> bool:
        return self.position == "conv_parallel" and self.activation == "identity"

    # -- choosing -----------------------------------------------------------------------------------------------

    def plan(self, survey: Survey) -> Plan:
        if self.position.startswith("conv"):
            sites, skipped = self._at_convolutions(survey)
        elif any(name in ROLES for name in ((self.sites,) if isinstance(self.sites, str) else self.sites or ())):
            sites, skipped = self._at_branches(survey)
        else:
            sites, skipped = self._at_blocks(survey)
        if not sites and skipped:
            raise SiteError(skipped[0].reason, where=skipped[0].path, remedy="Choose another position= or other sites")
        return Plan(tuple(self._noted(site) for site in sites), tuple(skipped))

    def _at_convolutions(self, survey: Survey) -> tuple[list[Site], list[Skipped]]:
        if self.sites is None:
            images = {t.shape[1] for t in tensors_of((survey.example.args, survey.example.kwargs)) if t.dim() == 4}
            found, left = survey.operations(None)
            layers = [la for la in found if _is_spatial(la.module) and la.operator.in_width not in images]
            skipped = [s for s in left if _is_spatial(survey.modules[s.path])]
        else:
            (layers, _), skipped = survey.resolve(self.sites, (), moved=False), []
        if not layers:
            raise SiteError(
                "no convolution over several positions is behind the image",
                where=type(survey.model).__name__,
                remedy='Use position="residual_parallel"',
            )
        sites = []
        for layer in layers:
            try:
                sites.append(self._at_convolution(survey, layer))
            except SiteError as error:
                skipped.append(Skipped(layer.path, error.reason))
        return sites, skipped

    def _at_convolution(self, survey: Survey, layer: Layer) -> Site:
        own, module = geometry.of_layer(survey, layer.path), layer.module
        assert isinstance(module, nn.Conv2d)
        if self.mergeable:
            groups = layer.operator.groups
            if groups != 1:
                raise SiteError(f"without an activation it would make a convolution of {groups} groups dense")
            return replace(survey.weight_site(layer, wants_shift=True), geometry=own)
        if self.position == "conv_parallel":
            return replace(block_site(survey, layer.path, "parallel"), geometry=own)
        return replace(block_site(survey, layer.path, "output"), geometry=geometry.behind(own.out_width, [module]))

    def _at_branches(self, survey: Survey) -> tuple[list[Site], list[Skipped]]:
        slot = "normed" if self.position == "residual_parallel" else "sum"
        found, skipped = branches(survey, self.sites, ())
        sites = []
        for branch in found:
            site = branch_site(survey, branch, slot)
            layers = [m for p in branch.inside if isinstance(m := survey.modules[p], nn.Conv2d)]
            sites.append(replace(site, geometry=geometry.behind(site.width, layers)))
        usable, flat = on_grid(survey, sites)
        return usable, skipped + flat

    def _at_blocks(self, survey: Survey) -> tuple[list[Site], list[Skipped]]:
        parallel = self.position == "residual_parallel"
        found, skipped = block_sites(survey, "parallel" if parallel else "output", self.sites)
        sites = []
        for site in found:
            try:
                form = geometry.across(survey, site) if parallel else None
            except SiteError as error:
                skipped.append(Skipped(site.path, error.reason))
                continue
            layers = geometry.within(survey, site.path)
            sites.append(replace(site, geometry=form or geometry.behind(site.width, layers)))
        usable, flat = on_grid(survey, sites)
        return usable, skipped + flat

    # -- building -----------------------------------------------------------------------------------------------

    def _hidden(self, form: Geometry) -> int:
        """Groups of at least ``reduction`` channels that divide the width."""
        most = max(form.in_width // self.reduction, 1)
        return next(h for h in range(most, 0, -1) if form.in_width % h == 0)

    def _noted(self, site: Site) -> Site:
        form = site.geometry
        assert form is not None
        size = form.in_width // self._hidden(form)
        if size == self.reduction:
            return site
        return noted(
            site, f"filters of {size} instead of {self.reduction} channels, which do not divide {form.in_width}"
        )

    def build(self, site: Site, device: torch.device | None, dtype: torch.dtype | None) -> Adapter:
        form = site.geometry
        assert form is not None
        if site.slot == "weight":
            return SeparableKernel(
                site.weight_shape,
                self._hidden(form),
                channel_dim=site.channel_dim,
                shift=site.has_shift,
                device=device,
                dtype=dtype,
            )
        return SeparableConv(form, self._hidden(form), self.activation, device=device, dtype=dtype)


def _is_spatial(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Conv2d) and max(layer.kernel_size) > 1
