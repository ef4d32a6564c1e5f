"""Switching a merged ViT-B/16 between tasks: refold's ``switch`` against PEFT's unmerge + merge, in one run.

    python benchmarks/switch.py [--rounds N] [--adapters N]

Every adapter is a rank 8 LoRA on qkv and fc1 of each block (24 sites), the same in both libraries. Each candidate
goes round its adapters, one switch a call; ratios are paired within a round (see ``refold.bench.measure.latency``).

* refold: from kept folds, the default, after one visit to each adapter.
* refold, nothing kept: ``switch(keep=0)``, which folds in float64 from the exact base at every switch.
* PEFT: ``unmerge_adapter``, ``set_adapter``, ``merge_adapter``.

After the timing the weights are compared with those of the first visit: refold's must be the same bits.
"""

from __future__ import annotations

import argparse
import itertools
import warnings
from collections.abc import Callable
from typing import Any

import timm
import torch
from torch import Tensor, nn

import common
import refold
from refold.bench import measure
from refold.state import require_state

RANK = 8
LAYERS = ("qkv", "fc1")


def backbone() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("vit_base_patch16_224", num_classes=10).eval()


def refold_switch(names: list[str], keep: int) -> tuple[nn.Module, Callable[[], None]]:
    model = backbone()
    sites = tuple(f"blocks.*.{layer}" for layer in LAYERS)
    for seed, name in enumerate(names):
        refold.attach(model, refold.LoRA(rank=RANK, sites=sites), name=name)
        common.perturb(model, seed)
    refold.merge(model, check=False)
    turns = itertools.cycle(names)
    return model, lambda: refold.switch(model, next(turns), keep=keep)


def peft_switch(names: list[str]) -> tuple[nn.Module, Callable[[], None]]:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=list(LAYERS))
    model = get_peft_model(backbone(), config, adapter_name=names[0])  # type: ignore[arg-type]
    for seed, name in enumerate(names):
        if seed:
            model.add_adapter(name, config)
        model.set_adapter(name)
        common.perturb(model, seed)
    model.set_adapter(names[0])
    model.merge_adapter([names[0]])
    turns = itertools.cycle(names)

    def run() -> None:
        name = next(turns)
        model.unmerge_adapter()
        model.set_adapter(name)
        model.merge_adapter([name])

    return model, run


def folded(model: nn.Module) -> dict[str, Tensor]:
    """The weights of the adapted layers."""
    return {
        n: p.detach().clone()
        for n, p in model.named_parameters()
        if "lora_" not in n and any(f".{layer}." in n for layer in LAYERS) and n.endswith("weight")
    }


def first_visits(model: nn.Module, run: Callable[[], None], count: int) -> list[dict[str, Tensor]]:
    visits = []
    for _ in range(count):
        run()
        visits.append(folded(model))
    return visits


def drift(model: nn.Module, run: Callable[[], None], visits: list[dict[str, Tensor]]) -> float:
    """Largest difference, over one more round, from the nearest of the first visits (the turn is not known)."""
    worst = 0.0
    for _ in visits:
        run()
        now = folded(model)
        worst = max(worst, min(max(float((now[n] - v).abs().max()) for n, v in visit.items()) for visit in visits))
    return worst


def main() -> None:
    warnings.filterwarnings("ignore")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--adapters", type=int, default=3)
    options = parser.parse_args()
    names = [f"task{i}" for i in range(options.adapters)]
    candidates = {
        "refold": refold_switch(names, keep=len(names)),
        "refold, nothing kept": refold_switch(names, keep=0),
        "PEFT": peft_switch(names),
    }
    visits = {name: first_visits(*candidate, len(names)) for name, candidate in candidates.items()}
    timings = measure.latency({name: run for name, (_, run) in candidates.items()}, rounds=options.rounds)
    rows: list[dict[str, Any]] = []
    for name, (model, run) in candidates.items():
        ratio = timings.ratio("PEFT", name)
        rows.append(
            {
                "name": name,
                "seconds": timings[name].median,
                "low": timings[name].low,
                "high": timings[name].high,
                "times_faster_than_peft": ratio.value,
                "interval": [ratio.low, ratio.high],
                "largest_drift": drift(model, run, visits[name]),
                "kept_bytes": kept_bytes(model),
            }
        )
        print(f"{name}: {rows[-1]['seconds']:.4f} s, {ratio} times PEFT's speed, drift {rows[-1]['largest_drift']:.1e}")
    facts = {"adapters": len(names), "rank": RANK, "sites": 24, "rounds": options.rounds}
    print(common.write("switch", rows, **facts))


def kept_bytes(model: nn.Module) -> int:
    """Memory of the kept folds; the exact base weights, which any merged model keeps, are not counted."""
    if "_refold" not in model.__dict__:
        return 0
    kept = require_state(model, "measure").kept.values()
    return sum(v.numel() * v.element_size() for entry in kept for v in entry.values.values())


if __name__ == "__main__":
    main()
