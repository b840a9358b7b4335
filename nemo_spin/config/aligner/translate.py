"""Keys of NeMo-Aligner whose meaning is set by another key here."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from nemo_spin.config.aligner.table import TABLE
from nemo_spin.config.reading import at

# keys that are known for their translation only -> the key that takes their value
TRANSLATED = {key: entry.target for key, entry in TABLE.items() if entry.target and entry.is_taken}
_DATASETS = ("model.data.train_ds", "model.data.validation_ds")


@dataclass(frozen=True, slots=True)
class Translation:
    """`key` means that `target` is `becomes`."""

    key: str
    target: str
    becomes: Any


def translations(cfg: Mapping[str, Any]) -> list[Translation]:
    """Which keys of a resolved configuration are translated.

    A time limit gives way to the one of exp_manager, if there are two. A field that may be cut asks for cutting, as it
    does in NeMo, unless `overlong` says what becomes of long examples or the data is said to be chats.
    """
    found = [
        Translation(key, target, value)
        for key, target in TRANSLATED.items()
        if (value := at(cfg, key)) is not None and (key != "trainer.max_time" or at(cfg, target) is None)
    ]
    return found + [
        Translation(f"{dataset}.truncation_field", f"{dataset}.overlong", "truncate")
        for dataset in _DATASETS
        if at(cfg, f"{dataset}.truncation_field") is not None
        and at(cfg, f"{dataset}.overlong") is None
        and at(cfg, "model.data.chat") is not True
    ]


def translate(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """The resolved configuration, with `target` of each translation set and the keys of `TRANSLATED` gone."""
    result = deepcopy(dict(cfg))
    for translation in translations(cfg):
        put(result, translation.target, translation.becomes)
    for key in TRANSLATED:
        section, _, name = key.rpartition(".")
        if isinstance(node := at(result, section), dict):
            node.pop(name, None)
    return result


def put(cfg: dict[str, Any], key: str, value: Any) -> None:
    """Set a full key, making the sections that it lies in."""
    *sections, name = key.split(".")
    for section in sections:
        if not isinstance(cfg.get(section), dict):
            cfg[section] = {}
        cfg = cfg[section]
    cfg[name] = value


def without_effect(cfg: Mapping[str, Any]) -> dict[str, str]:
    """Keys that are read, but come to nothing beside others in this configuration -> the reason."""
    reasons = {}
    limit = at(cfg, "exp_manager.max_time_per_run")
    if limit is not None and at(cfg, "trainer.max_time") not in (None, limit):
        reasons["trainer.max_time"] = f"exp_manager.max_time_per_run = {limit} is what counts"
    for dataset in _DATASETS:
        overlong = at(cfg, f"{dataset}.overlong")
        if overlong is None and at(cfg, "model.data.chat") is True:
            reason = "chats are not cut, and longer ones are refused; overlong: drop leaves them out"
        elif overlong in ("refuse", "drop"):
            reason = f"{dataset}.overlong = {overlong} is what counts"
        else:
            continue
        if at(cfg, f"{dataset}.truncation_field") is not None:
            reasons[f"{dataset}.truncation_field"] = reason
            if at(cfg, f"{dataset}.truncation_method") not in (None, "right"):
                reasons[f"{dataset}.truncation_method"] = reason
    return reasons
