"""What is shown of a method is what its docstrings say."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest

import refold
from refold.bench.shelf import Cost
from refold.methods import Plan
from refold.report.methods import extra, link, merges, page, parameters

PLAN = Plan()


@pytest.mark.parametrize("method", refold.METHODS.values(), ids=lambda method: method.__name__)
def test_every_method_says_what_it_is_and_what_each_hyper_parameter_means(method):
    found = page(method)
    assert found.about
    assert found.header
    assert [p.name for p in found.parameters if not p.meaning] == []
    assert not any(text.startswith(("Args:", "Raises:", "Use it")) for text in found.about)


def test_the_parts_of_a_docstring():
    found = page(refold.AdaptFormer)
    first = found.parameters[0]
    assert (first.name, first.default) == ("hidden", "8")
    assert first.meaning == "inner width h; the paper's default is 64, its comparisons on VTAB use 8."
    assert found.about == ("Bottleneck with an activation beside the MLP, on the residual stream before its norm.",)
    assert found.use.startswith("Use it where the adapter may stay")
    assert found.header[0].startswith('AdaptFormer: "Adapting Vision Transformers')
    assert found.header[1].startswith("    out = x + MLP(LN(x))")


def test_arguments_that_a_class_takes_over_are_those_of_the_class_it_derives_from():
    assert page(refold.DoRA).parameters == page(refold.LoRA).parameters
    assert "see ``LoRA``" in " ".join(page(refold.DoRA).about)


def test_of_a_file_with_several_methods_only_what_concerns_this_one():
    header = "\n".join(page(refold.BitFit).header)
    assert "102,912" in header
    assert "38,400" not in header
    assert "BatchNorm" in header


def test_a_method_without_a_recommendation_has_none():
    @dataclass(frozen=True)
    class Bare(refold.LinearProbe):
        """Nothing more."""

        summary: ClassVar[str] = "-"

    assert page(Bare).use == ""
    assert page(Bare).about == ("Nothing more.",)


def test_cells():
    cost = Cost("vit_base_patch16_224", 1_234, 0.1, 0.0526, PLAN)
    other = Cost("resnet50", 1_234, 0.1, None, PLAN)
    assert (parameters(cost), parameters(other), parameters(None)) == ("1,234", "1,234 (ResNet-50)", "-")
    assert (merges(refold.LoRA()), merges(refold.AdaptFormer()), merges(refold.BitFit())) == ("yes", "no", "in place")
    assert merges(refold.Adapter()) == "without activation"
    assert merges(refold.Adapter(activation="identity")) == "yes"
    assert extra(refold.LoRA(), cost) == "none"
    assert extra(refold.AdaptFormer(), cost) == "+5.3 %"
    assert extra(refold.AdaptFormer(), other) == extra(refold.AdaptFormer(), None) == "-"
    assert link("arXiv 2302.08106") == "https://arxiv.org/abs/2302.08106"
    assert link("after arXiv 2207.14381") == "https://arxiv.org/abs/2207.14381"
    assert link("CVPR 2024") == link("-") == ""
