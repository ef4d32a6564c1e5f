"""Speed against the peers, side by side in one run: inference, a training step, stored bytes, a whole epoch.

    python benchmarks/speed.py [inference] [step] [epoch]

* inference: ViT-S/16 with a merged RepAdapter against the untouched backbone, batch 1, 4 and 16.
* step: one forward and backward pass of ViT-S/14 at 112 px, batch 32, and the bytes autograd stores for it:
  full fine-tuning, PEFT LoRA, refold's LoRA and RepAdapter at the same sites and rank, and a linear probe;
  in float32 and in bfloat16 as each library's user would run it.
* epoch: a whole training epoch on ELPV at 112 px, ``refold.train``'s loop against the plain script.

Every number is a ratio of times paired within a round (see ``refold.bench.measure.latency``).
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable
from typing import Any

import timm
import torch
from torch import Tensor, nn

import common
import plain_script
import refold
from refold.bench import measure
from refold.training.attention import choose_attention
from refold.training.precision import reduced_precision

RANK = 8
SITES = ("attention", "mlp")


def inference(rounds: int) -> list[dict[str, Any]]:
    """The merged model is the same computation with other numbers: the ratio shows that nothing was added."""
    torch.manual_seed(0)
    untouched = timm.create_model("vit_small_patch16_224", num_classes=37).eval()
    torch.manual_seed(0)
    merged = timm.create_model("vit_small_patch16_224", num_classes=37)
    refold.attach(merged, refold.RepAdapter(rank=RANK))
    common.perturb(merged)
    merged.eval()
    unmerged = _deepcopy(merged)
    refold.merge(merged)
    rows = []
    for batch in (1, 4, 16):
        images = torch.randn(batch, 3, 224, 224)
        candidates = {"backbone": untouched, "merged": merged, "unmerged": unmerged}
        with torch.inference_mode():
            functions = {name: _call(model, images) for name, model in candidates.items()}
            timings = measure.latency(functions, rounds=rounds)
        rows += measure.cost_rows(timings, batch=batch, reference="backbone")
        print(*(f"batch {batch}: {row['name']} {row['ratio']:.3f}" for row in rows[-3:]), sep="\n", flush=True)
    return rows


def _call(model: nn.Module, images: Tensor) -> Callable[[], object]:
    return lambda: model(images)


def _deepcopy(model: nn.Module) -> nn.Module:
    import copy

    return copy.deepcopy(model)


def backbone() -> nn.Module:
    """ViT-S/14 at 112 px, the architecture of the packaged model; time does not depend on its values."""
    torch.manual_seed(0)
    return timm.create_model("vit_small_patch14_dinov2", num_classes=2, img_size=112).train()


def peft_lora() -> nn.Module:
    """PEFT on the same layers: each block's qkv and fc1."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["qkv", "fc1"], modules_to_save=["head"])
    return get_peft_model(backbone(), config)  # type: ignore[arg-type]


def attached(method: refold.Method) -> nn.Module:
    return refold.attach(backbone(), method)


CANDIDATES: dict[str, Callable[[], nn.Module]] = {
    "full fine-tuning": lambda: attached(refold.FullFineTune()),
    "PEFT LoRA": peft_lora,
    "refold LoRA": lambda: attached(refold.LoRA(rank=RANK, sites=SITES)),
    "refold RepAdapter": lambda: attached(refold.RepAdapter(rank=RANK, sites=SITES)),
    "linear probe": lambda: attached(refold.LinearProbe()),
}


def step(rounds: int) -> list[dict[str, Any]]:
    """float32: the same code path for all. bfloat16: autocast; refold's own candidates as its trainer runs them.

    refold holds frozen weights in bfloat16 and picks the attention kernel; a PEFT user gets neither, so the rows
    say what each library does by default. Full fine-tuning gets refold's attention kernel too.
    """
    images, targets = torch.randn(32, 3, 112, 112), torch.randint(0, 2, (32,))
    rows = []
    for precision in ("float32", "bfloat16"):
        functions, stored, contexts = {}, {}, []
        for name, build in CANDIDATES.items():
            model = build()
            low = precision == "bfloat16"
            if low and name != "PEFT LoRA":
                contexts.append(reduced_precision(model))
                contexts[-1].__enter__()
            forward = common.training_forward(model, images, targets, low)
            kernel = choose_attention(forward, torch.device("cpu")) if low and name != "PEFT LoRA" else "default"
            functions[name] = common.training_step(model, forward, kernel)
            stored[name] = measure.stored_bytes(forward, model)
        torch.set_flush_denormal(True)
        timings = measure.latency(functions, rounds=rounds, warmup=1)
        torch.set_flush_denormal(False)
        for context in contexts:
            context.__exit__(None, None, None)
        for name in functions:
            ratio, peft = timings.ratio(name, "full fine-tuning"), timings.ratio(name, "PEFT LoRA")
            rows.append(
                {
                    "name": name,
                    "precision": precision,
                    "seconds": timings[name].median,
                    "time_ratio_full": ratio.value,
                    "time_ratio_full_interval": [ratio.low, ratio.high],
                    "time_ratio_peft": peft.value,
                    "time_ratio_peft_interval": [peft.low, peft.high],
                    "stored_bytes": stored[name].activations,
                    "stored_ratio_full": stored[name].activations / stored["full fine-tuning"].activations,
                }
            )
            print(precision, name, f"time {ratio} of full, stored {rows[-1]['stored_ratio_full']:.3f}", flush=True)
    return rows


def epoch(rounds: int) -> list[dict[str, Any]]:
    """One epoch of 800 ELPV images, decoding included where the script decodes, validation left out of both."""
    functions = {"refold": plain_script.refold_epoch(), "plain script": plain_script.plain_epoch()}
    timings = measure.latency(functions, rounds=rounds, warmup=1)
    ratio = timings.ratio("refold", "plain script")
    print(f"epoch: refold / plain script {ratio}", flush=True)
    return [
        {"name": name, "seconds": timing.median, "low": timing.low, "high": timing.high}
        | ({"ratio": ratio.value, "interval": [ratio.low, ratio.high]} if name == "refold" else {})
        for name, timing in timings.items()
    ]


PARTS = {"inference": (inference, 15), "step": (step, 15), "epoch": (epoch, 5)}


def main() -> None:
    warnings.filterwarnings("ignore")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], default=[], help="which parts to run; all if none")
    for part in parser.parse_args().parts or PARTS:
        function, rounds = PARTS[part]
        print(common.write(f"speed_{part}", function(rounds)), flush=True)


if __name__ == "__main__":
    main()
