"""``docs/families.md`` from the sweep's rows."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from common import markdown

__all__ = ["write"]

PAGE = Path(__file__).parent.parent / "docs" / "families.md"
VERDICTS = ("exact", "refused", "wrong", "error")
LIBRARIES = ("timm", "transformers", "torchvision", "open_clip", "research")
GROUPS = ("timm", "timm, further designs", *LIBRARIES[1:])

Rows = dict[tuple[str, str], dict[str, Any]]

INTRO = """# Every backbone: exact or refused

Written by `make bench-families`; do not edit. {date}; {versions}.

Each row is one backbone in float64 on weights that hide nothing (no zero biases, unit norms or tiny layer scales).
Adapters are attached, moved away from their start and merged, and the model is restored.

* **exact**: merged and unmerged outputs differ by at most 1e-10 (relative L2), the merged model has the backbone's own
  keys, every adapter changes the output, and `detach` gives every bit back. Models that compute in float32 inside may
  differ by ten times what one unit in the last place of their weights does.
* **refused**: an error that names the layer, the reason and the remedy. **wrong**: different outputs in silence.
  **error**: any other exception, or no answer within the time limit.
* **reach**, in per cent: the share of the weights of all affine layers outside the head that have an adapter
  (Linear, convolutions, `nn.MultiheadAttention`; for SSF norms too). RepAdapter's default chooses by role, on purpose.

timm: the smallest model of every model file, and further designs of some (after a colon). transformers: tiny
configurations. PEFT gets a LoRA of the same rank on every Linear and ungrouped Conv1d, Conv2d and Conv3d, named
explicitly, head left out; in the second column on grouped convolutions too. Its restoring is `unload`.
"""


def write(rows: Rows, seconds: float) -> None:
    """``seconds``: how long the last run took, printed only, because most runs are partial."""
    methods = list(dict.fromkeys(method for _, method in _sorted(rows)))
    facts: dict[str, str] = {}
    for row in rows.values():
        facts.update({k: v for k, v in row["versions"].items() if k != "refold"})
    date = max(row["date"] for row in rows.values())
    states = sorted({row["versions"]["refold"] for row in rows.values() if "refold" in row["versions"]})
    facts["refold's sources"] = states[0] if len(states) == 1 else f"{len(states)} states (run again for one)"
    parts = [
        INTRO.format(date=date, versions=", ".join(f"{k} {v}" for k, v in sorted(facts.items()))),
        "## Summary\n\nFamilies exact / refused / wrong / error; below, PEFT beside refold.\n",
        _summary(rows, methods),
        "\n## Reach and roles\n",
        _reach(rows, methods),
        _roles(rows),
        "\n## Not exact\n",
        _failures(rows),
        "\n## Families\n",
        _families(rows, methods),
        "\n## Gaps\n\nLayers without an adapter under the methods that want every layer, by reason.\n",
        _gaps(rows),
    ]
    PAGE.write_text("\n".join(parts) + "\n")
    print(f"{len(rows)} rows; this run took {seconds:.0f} s; wrote {PAGE}")


def _sorted(rows: Rows) -> list[tuple[str, str]]:
    """Keys with refold's methods before PEFT's, in the order the sweep lists them."""
    from families_check import METHODS, PEFT

    order = [*METHODS, *PEFT]
    return sorted((k for k in rows if k[1] in order), key=lambda k: (order.index(k[1]), k[0]))


def _group(row: dict[str, Any]) -> str:
    """The library, with timm's model files apart from further designs of the same files."""
    return "timm, further designs" if row["library"] == "timm" and ":" in row["family"] else row["library"]


def _of(rows: Rows, group: str | None, method: str) -> list[dict[str, Any]]:
    return [r for r in rows.values() if r["method"] == method and group in (None, _group(r))]


def _counts(found: Iterable[dict[str, Any]]) -> str:
    count = Counter(row["verdict"] for row in found)
    return " / ".join(str(count[v]) for v in VERDICTS)


def _summary(rows: Rows, methods: list[str]) -> str:
    groups = [g for g in GROUPS if any(_group(r) == g for r in rows.values())]
    sizes = {g: len({r["family"] for r in rows.values() if _group(r) == g}) for g in groups}
    lines = [[m, *(_counts(_of(rows, g, m)) for g in groups), _counts(_of(rows, None, m))] for m in methods]
    return markdown(["method", *(f"{g} ({n})" for g, n in sizes.items()), f"all ({sum(sizes.values())})"], lines)


def _share(row: dict[str, Any]) -> float:
    return row["weights"] / row["weights_total"] if row["weights_total"] else 1.0


def _reach(rows: Rows, methods: list[str]) -> str:
    lines = []
    for method in methods:
        found = [r for r in _of(rows, None, method) if r["layers_total"]]
        shares = sorted(map(_share, found))
        if shares:
            full = sum(s >= 0.95 for s in shares)
            low = shares[0]
            restored = sum(r["restored"] is True for r in found)
            median = shares[len(shares) // 2]
            lines.append([method, f"{full} of {len(shares)}", f"{median:.1%}", f"{low:.1%}", restored])
    return markdown(["method", "families with 95 % of the weights", "median", "lowest", "restored bit for bit"], lines)


def _roles(rows: Rows) -> str:
    found = _of(rows, None, "RepAdapter")
    named = [r for r in found if r["roles"]]
    lines = [
        f"\nRepAdapter's default found the paper's roles in {len(named)} of {len(found)} families, and in every block "
        f"of {sum(r['roles_complete'] is True for r in named)} of them; elsewhere it takes every layer it can."
    ]
    partly = [r["family"] for r in named if r["roles_complete"] is not True]
    if partly:
        lines.append(f"Not in every block: {', '.join(sorted(partly))}.")
    others = sorted(r["family"] for r in found if not r["roles"] and r["layers"])
    lines.append(f"No roles: {', '.join(others) or 'none'}.")
    return "\n\n".join(lines)


def _failures(rows: Rows) -> str:
    ours = [rows[k] for k in _sorted(rows) if rows[k]["verdict"] != "exact"]
    lines = []
    for row in ours:
        reason = row["reason"].replace("|", "\\|").replace("\n", " ")
        lines.append([row["family"], row["method"], row["verdict"], reason[:220]])
    refold = [line for line in lines if not line[1].startswith("PEFT")]
    peft: dict[tuple[str, str, str], list[str]] = defaultdict(list)
    for line in lines:
        if line[1].startswith("PEFT"):
            kind = line[3].split(":")[0] if line[2] == "error" else "merged and unmerged outputs differ"
            kind = "a grouped convolution" if "groups=" in line[3] else kind
            peft[line[1], line[2], kind].append(line[0])
    text = markdown(["family", "method", "verdict", "reason"], refold) if refold else "refold: none."
    if peft:
        table = [[m, v, k, len(names), ", ".join(sorted(names))] for (m, v, k), names in sorted(peft.items())]
        text += "\n\n" + markdown(["PEFT", "verdict", "reason", "families", "which"], table)
    return text


def _families(rows: Rows, methods: list[str]) -> str:
    lines = []
    for family in sorted({k[0] for k in rows}, key=lambda f: (LIBRARIES.index(f.partition("/")[0]), f)):
        found = [rows.get((family, m)) for m in methods]
        one = next(r for r in found if r is not None)
        lines.append([family, one["model"], f"{one.get('parameters', 0) / 1e6:.1f}", *map(_cell, found)])
    return markdown(["family", "model", "M parameters", *methods], lines)


def _cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    if row["verdict"] == "exact":
        return f"{100 * _share(row):.0f}"
    return f"**{row['verdict']}**"


def _gaps(rows: Rows) -> str:
    weights: Counter[tuple[str, str]] = Counter()
    families: dict[tuple[str, str], list[str]] = defaultdict(list)
    for row in rows.values():
        for reason, count in row["gaps"].items():
            weights[row["method"], reason] += count
            families[row["method"], reason].append(row["family"])
    lines = []
    for (method, reason), count in sorted(weights.items(), key=lambda item: (item[0][0], -item[1])):
        names = sorted(families[method, reason])
        shown = ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
        lines.append([method, reason.replace("|", "\\|"), f"{count / 1e6:.2f}", shown])
    return markdown(["method", "layer and reason", "M weights", "families"], lines)
