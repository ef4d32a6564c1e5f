"""The families sweep must not call a wrong merge exact: its checks, against faults put in on purpose."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import refold

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import families_check
from families_check import EXACT, Family, Row, check, dead_sites
from families_reach import affine_layers, roles_complete


class Bypass(nn.Module):
    """A layer that is called, and one whose weight is multiplied without calling it."""

    def __init__(self) -> None:
        super().__init__()
        self.called, self.bypassed, self.norm = nn.Linear(4, 4), nn.Linear(4, 4), nn.LayerNorm(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.called(nn.functional.linear(x, self.bypassed.weight)))


def inputs(batch: int) -> tuple[Tensor]:
    return (torch.randn(batch, 4, generator=torch.Generator().manual_seed(batch), dtype=torch.float64),)


FAMILY = Family("tests", "bypass", Bypass, inputs)


def verdict(method: str = "LoRA everywhere") -> Row:
    return check(families_check.fill(Bypass().double()).eval(), FAMILY, method, EXACT)


@pytest.mark.parametrize("method", families_check.METHODS)
def test_a_right_merge_is_exact(method):
    row = verdict(method)
    assert (row.verdict, row.reason, row.restored, row.dead) == ("exact", "", True, [])
    assert row.error <= EXACT
    assert row.effect > 1e-3


def test_a_merge_off_by_a_billionth_is_not_exact(monkeypatch):
    real = refold.merge

    def merge(model: nn.Module, **options: bool) -> None:
        real(model, **options)
        with torch.no_grad():
            model.called.weight.mul_(1 + 1e-9)  # pyright: ignore

    monkeypatch.setattr(refold, "merge", merge)
    monkeypatch.setattr(refold, "unmerge", lambda model: None)
    row = verdict()
    assert row.verdict != "exact"
    assert row.error > EXACT


def test_a_backbone_that_does_not_come_back_is_wrong(monkeypatch):
    real = refold.detach

    def detach(model: nn.Module) -> None:
        real(model)
        with torch.no_grad():
            model.norm.bias[0] += 1e-15  # pyright: ignore

    monkeypatch.setattr(refold, "detach", detach)
    row = verdict()
    assert row.verdict == "wrong"
    assert row.restored is False


def test_an_adapter_that_changes_nothing_is_found(monkeypatch):
    model = families_check.fill(Bypass().double()).eval()
    refold.attach(model, refold.LoRA(rank=2, sites=("called", "bypassed")), example=inputs(1), trainable=())
    families_check.perturb(refold.trainable_parameters(model).values())
    assert dead_sites(model, {"called", "bypassed"}, inputs(2)) == []
    model.forward = lambda x: model.norm(model.called(x @ bypassed.T))  # pyright: ignore
    bypassed = model.bypassed.weight
    model.called._forward_hooks.clear()
    model.called._forward_pre_hooks.clear()
    assert dead_sites(model, {"called", "bypassed"}, inputs(2)) == ["bypassed", "called"]


def test_any_error_is_a_row_and_names_its_place(monkeypatch):
    def fails(*args: object, **options: object) -> None:
        raise ZeroDivisionError("a fault")

    monkeypatch.setattr(refold, "attach", fails)
    row = verdict()
    assert row.verdict == "error"
    assert "ZeroDivisionError: a fault (test_bench_families.py" in row.reason


def test_a_refusal_is_no_error(monkeypatch):
    def refuses(*args: object, **options: object) -> None:
        raise refold.RefoldError("no", where="here", remedy="Do this")

    monkeypatch.setattr(refold, "attach", refuses)
    row = verdict()
    assert (row.verdict, row.restored) == ("refused", True)
    assert "here: no. Do this" in row.reason


def test_affine_layers_leave_out_the_head_and_count_shared_weights_once():
    model = nn.ModuleDict(
        {"body": nn.Linear(3, 5), "twin": nn.Linear(3, 5), "norm": nn.LayerNorm(5), "head": nn.Linear(5, 2)}
    )
    model["twin"].weight = model["body"].weight
    assert affine_layers(model, ("head",), norms=False) == {"body": 15, "twin": 0}
    assert affine_layers(model, ("head",), norms=True) == {"body": 15, "twin": 0, "norm": 5}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mixer, self.mlp = nn.Linear(2, 2), nn.Linear(2, 2)


def test_roles_are_complete_only_if_every_block_has_both():
    model = nn.Sequential(Block(), Block())
    roles = {"0.mixer": "attention", "0.mlp": "mlp", "1.mixer": "attention"}
    assert roles_complete(model, roles) is False
    assert roles_complete(model, {**roles, "1.mlp": "mlp"}) is True
    assert roles_complete(model, {"0.mixer": ""}) is None
