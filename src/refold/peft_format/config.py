"""``adapter_config.json`` of a PEFT checkpoint: what it means for the weights, or why it is refused."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from refold.errors import StoreError
from refold.methods.base import is_count, is_number

__all__ = ["CONFIG", "PREFIX", "WEIGHTS", "Config", "read_config"]

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
#: What PEFT's wrapper puts before the names of the backbone.
PREFIX = "base_model.model."

_MAX_BYTES = 4 * 2**20
_MAX_PATTERN, _MAX_PATTERNS = 512, 4096
_MERGE = "Merge it with PEFT (merge_and_unload) and use the merged weights as a backbone"

#: Keys that do not say what a trained adapter computes: which layers it is on, what trains beside it and its biases
#: are read from the tensors; the rest served its initialisation, or a run of PEFT.
_ELSEWHERE = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "bias",
        "corda_config",
        "eva_config",
        "exclude_modules",
        "inference_mode",
        "layers_pattern",
        "layers_to_transform",
        "loftq_config",
        "lora_bias",
        "lora_ga_config",
        "megatron_core",
        "modules_to_save",
        "peft_version",
        "qalora_group_size",
        "revision",
        "runtime_config",
        "target_modules",
        "task_type",
    }
)
_READ = frozenset(
    {
        "alpha_pattern",
        "fan_in_fan_out",
        "init_lora_weights",
        "lora_alpha",
        "lora_dropout",
        "peft_type",
        "r",
        "rank_pattern",
        "use_dora",
        "use_rslora",
    }
)
#: Initialisations that leave the backbone's weights alone.
_PLAIN_STARTS = frozenset({"gaussian", "eva", "orthogonal"})


@dataclass(frozen=True)
class Config:
    """What the configuration says about every layer's map.

    Attributes:
        rank, alpha: of the layers that no pattern names.
        ranks, alphas: (pattern, value); the first pattern that matches holds.
        rslora: scale by alpha / sqrt(rank) instead of alpha / rank.
        dora: weight-decomposed.
        dropout: on the input of A.
        saved: names of the modules that were trained in place.
    """

    rank: int
    alpha: float
    ranks: tuple[tuple[re.Pattern[str], int], ...]
    alphas: tuple[tuple[re.Pattern[str], float], ...]
    rslora: bool
    dora: bool
    dropout: float
    saved: tuple[str, ...]

    def at(self, path: str) -> tuple[int, float]:
        """Rank and scale of the layer at ``path``."""
        rank = next((r for pattern, r in self.ranks if pattern.match(path)), self.rank)
        alpha = next((a for pattern, a in self.alphas if pattern.match(path)), self.alpha)
        return rank, alpha / (math.sqrt(rank) if self.rslora else rank)


def read_config(path: Path) -> Config:
    """The configuration in ``path``.

    Raises:
        StoreError: the file is missing or malformed, or a key cannot be honoured exactly; the error names it.
    """
    data = _read(path)
    where = str(path)

    def refuse(key: str, reason: str, remedy: str) -> StoreError:
        return StoreError(f"{key}={_short(data.get(key))} {reason}", where=where, remedy=remedy)

    def checked(key: str, default: Any, ok: Any, wants: str) -> Any:
        value = data.get(key, default)
        if not ok(value):
            raise refuse(key, f"is not {wants}", "Copy or download it again")
        return value

    if data.get("peft_type") != "LORA":
        raise refuse("peft_type", "is not LoRA or DoRA", f"Only 'LORA' can be read. {_MERGE}")
    if checked("fan_in_fan_out", False, _is_flag, "true or false"):
        raise refuse("fan_in_fan_out", "stores weights transposed, as no vision layer here does", _MERGE)
    start = data.get("init_lora_weights", True)
    if not (isinstance(start, bool) or (isinstance(start, str) and start.lower() in _PLAIN_STARTS)):
        raise refuse(
            "init_lora_weights",
            "changed the backbone's own weights or the training, which this file does not hold",
            f"Save it with PEFT's path_initial_model_for_weight_conversion. Or: {_MERGE[0].lower()}{_MERGE[1:]}",
        )
    for key in sorted(data.keys() - _READ - _ELSEWHERE):
        if data[key] not in (None, False, [], {}):
            raise refuse(key, "asks for something refold does not know how to honour", _MERGE)
    saved = checked("modules_to_save", None, lambda v: v is None or _are_names(v), "a list of names")
    return Config(
        rank=checked("r", 8, is_count, "a positive integer"),
        alpha=checked("lora_alpha", 8, _is_alpha, "a number other than 0"),
        ranks=tuple(_patterns(data, "rank_pattern", is_count, "positive integers", where)),
        alphas=tuple(_patterns(data, "alpha_pattern", _is_alpha, "numbers other than 0", where)),
        rslora=checked("use_rslora", False, _is_flag, "true or false"),
        dora=checked("use_dora", False, _is_flag, "true or false"),
        dropout=checked("lora_dropout", 0.0, lambda v: is_number(v, 0.0, 0.999), "in [0, 1)"),
        saved=tuple(saved or ()),
    )


def _read(path: Path) -> dict[str, Any]:
    where = str(path)
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise StoreError("implausibly large for a configuration", where=where)
        data = json.loads(path.read_bytes())
    except OSError as error:
        raise StoreError(
            f"cannot be read ({error.strerror or error})",
            where=where,
            remedy="Give the folder that PEFT's save_pretrained wrote",
        ) from error
    except (ValueError, RecursionError) as error:
        raise StoreError(f"is not valid JSON ({error})", where=where) from error
    if not isinstance(data, dict):
        raise StoreError("holds no JSON object", where=where)
    return data


def _patterns(data: dict[str, Any], key: str, ok: Any, wants: str, where: str) -> Iterator[tuple[re.Pattern[str], Any]]:
    """PEFT matches ``(.*\\.)?(pattern)$``; a stranger's expression must not be able to run for ever."""
    found = data.get(key) or {}
    if not isinstance(found, dict) or len(found) > _MAX_PATTERNS or not all(map(ok, found.values())):
        raise StoreError(f"{key}={_short(found)} is not an object of at most {_MAX_PATTERNS} {wants}", where=where)
    for text, value in found.items():
        # Repetitions of single characters, a few of them, take polynomial time; repeated groups exponential.
        risky = len(text) > _MAX_PATTERN or len(re.findall(r"[*+?{]", text)) > 3 or re.search(r"\)[*+?{]", text)
        try:
            if risky or "(?" in text or re.search(r"\\[1-9]", text):
                raise ValueError("it repeats too much to be matched safely")
            yield re.compile(rf"(.*\.)?({text})$"), value
        except (ValueError, OverflowError, re.error) as error:
            raise StoreError(
                f"{key} has the expression {_short(text)}, which is refused: {error}",
                where=where,
                remedy="Write module paths there",
            ) from error


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _is_flag(value: object) -> bool:
    return isinstance(value, bool)


def _is_alpha(value: object) -> bool:
    return is_number(value, -1e6, 1e6) and value != 0


def _are_names(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(v, str) and v for v in value)
