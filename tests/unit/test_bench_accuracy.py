"""The accuracy benchmark takes every method, keeps what was run, and builds the cut-outs as it says."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import refold

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import accuracy_cost
import accuracy_data
import accuracy_report
import accuracy_runs
from accuracy_entries import LEFT_OUT, VIT, Entry, Point, entries, probe_of


def test_every_method_has_a_row_or_a_reason():
    listed = entries()
    assert {entry.method for entry in listed} | set(LEFT_OUT) >= set(refold.METHODS)
    assert len({entry.slug for entry in listed}) == len(listed)  # two entries of one name would share their files
    for entry in listed:
        assert len(entry.grid) == 3
        assert [entry.build(point) for point in entry.grid]
        assert probe_of(entry).backbone == entry.backbone
        assert listed.index(probe_of(entry)) <= listed.index(entry)


def test_results_of_earlier_versions_still_count():
    rows = accuracy_report.finished()
    assert {"linear-probe", "RepAdapter", "LoRA", "BitFit", "full-fine-tuning"} <= {s for d, s in rows if d == "elpv"}
    committed = json.loads((accuracy_runs.RUNS / "elpv-LoRA-0.003-1.test.json").read_text())
    assert rows["elpv", "LoRA"]["test_accuracy"][1] == committed["accuracy"]


def test_a_row_needs_every_run_with_the_present_settings(tmp_path, monkeypatch):
    monkeypatch.setattr(accuracy_runs, "RUNS", tmp_path)
    probe, entry = probe_of(Entry("LoRA", "LoRA")), Entry("LoRA", "LoRA", {"rank": 4})

    def write(chosen, lr, seed, accuracy, settings):
        key = f"elpv-{chosen.slug}-{lr:g}-{seed}"
        val = {"accuracy": accuracy, "loss": 1.0}
        record = {"settings": settings, "val": val, "seconds": 1, "adapter_parameters": 5, "trainable_parameters": 7}
        (tmp_path / f"{key}.json").write_text(json.dumps(record))
        scores = {"accuracy": accuracy, "f1": 0.5, "auroc": 0.5}
        (tmp_path / f"{key}.test.json").write_text(json.dumps(scores))

    def fill(chosen, settings):
        for k, point in enumerate(chosen.grid):
            for seed in accuracy_runs.SEEDS:
                write(chosen, point.lr, seed, 0.7 + (0.1 if k == 1 else 0.0) + 0.01 * seed, settings)

    fill(probe, {"name": "LinearProbe"})
    fill(entry, {"name": "LoRA", "rank": 8})
    with pytest.raises(accuracy_runs.Unfinished):
        accuracy_runs.suite("elpv", entry)
    fill(entry, {"name": "LoRA", "rank": 4})
    row = accuracy_runs.suite("elpv", entry)
    assert (row["lr"], row["head_lr"]) == (entry.grid[1].lr, probe.grid[1].lr)
    assert row["test_accuracy"] == pytest.approx([0.8, 0.81, 0.82])
    (tmp_path / f"elpv-LoRA-{row['lr']:g}-2.test.json").unlink()
    with pytest.raises(accuracy_runs.Unfinished):
        accuracy_runs.suite("elpv", entry)


def test_a_point_changes_hyper_parameters_and_the_key():
    entry = Entry("LoRA", "LoRA", {"rank": 4}, (Point(1e-3, (("scale", 10.0),)),))
    assert entry.build(entry.grid[0]) == refold.LoRA(rank=4, scale=10.0)
    assert (str(entry.grid[0]), entry.grid[0].slug) == ("0.001, scale 10", "0.001-scale10")


def test_cost_is_measured_once(tmp_path, monkeypatch):
    monkeypatch.setattr(accuracy_cost, "COSTS", tmp_path)
    entry = Entry("LoRA", "LoRA")
    assert accuracy_cost.read(entry) is None
    (tmp_path / "LoRA.json").write_text(json.dumps({"settings": entry.build().to_json(), "step": 1}))
    assert accuracy_cost.cost(entry)["step"] == 1
    assert accuracy_cost.read(Entry("LoRA", "LoRA", {"rank": 4})) is None
    assert entry.backbone == VIT


def test_cut_outs_are_pasted_on_white_and_twins_left_out(tmp_path):
    def stamp(path: Path, seed: int, mirror: bool = False) -> None:
        blocks = np.random.default_rng(seed).integers(0, 255, (5, 4, 3), dtype=np.uint8)
        pixels = np.zeros((60, 60, 4), np.uint8)
        pixels[5:55, 10:50, :3] = blocks.repeat(10, 0).repeat(10, 1)
        pixels[5:55, 10:50, 3] = 255
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels[:, ::-1] if mirror else pixels).save(path)

    for k in range(20):
        stamp(tmp_path / "animals" / "birds" / f"b{k:02}.png", k)
        stamp(tmp_path / "food" / "fruit" / "cartoon" / f"f{k:02}.png", 100 + k)
        stamp(tmp_path / "symbols" / "math" / f"s{k:02}.png", 200 + k)
    for k in range(15):
        stamp(tmp_path / "food" / "nuts" / f"n{k:02}.png", 300 + k)
    stamp(tmp_path / "animals" / "birds" / "b00_mirror.png", 999)
    stamp(tmp_path / "animals" / "birds" / "again.png", 3)
    stamp(tmp_path / "animals" / "birds" / "turned.png", 4, mirror=True)
    splits = accuracy_data.cut_outs(tmp_path)
    assert splits.classes == ["animals/birds", "food/fruit"]
    assert splits.val is not None
    assert splits.test is not None
    for part, count in ((splits.train, 8), (splits.val, 4), (splits.test, 8)):
        assert part.targets.bincount().tolist() == [count, count]
    names = [Path(path).name for part in (splits.train, splits.val, splits.test) for path in part.paths]
    assert len(set(names)) == 40
    assert not {"b00_mirror.png", "b03.png", "b04.png"} <= set(names)
    assert "b00_mirror.png" not in names
    image = splits.train.read([0], (224, 224))[0]
    assert (image[:, :, :20] == 255).all()  # 50 of 40 x 50 pixels is the side: white on both sides
    assert (image[:, :, 40:180] < 250).any()
