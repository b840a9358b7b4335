"""What a run would make of this machine and of a configuration, before anybody waits in a queue for it.

Neither the checkpoint nor the data of the configuration need exist.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from nemo_spin.commands.environment import Component, components
from nemo_spin.config import addable_overrides, config_dir, resolved, with_defaults, with_shipped_configurations
from nemo_spin.config.composing import composing
from nemo_spin.config.parse import judged
from nemo_spin.config.reading import at
from nemo_spin.config.review import (
    NO_EFFECT,
    REFUSED,
    TO_BE_GIVEN,
    TRANSLATED_TO,
    VERDICTS,
    Verdict,
    sizes_not_given,
    verdicts,
)
from nemo_spin.config.values import in_words
from nemo_spin.errors import EXIT_CODE, ConfigError, MissingKeyError


@dataclass(frozen=True, slots=True)
class ConfigReview:
    """keys: what becomes of each. refused: for what the configuration is refused, a sentence each.
    missing: keys that have to be given before a run can begin. notes: what is taken for keys that are left out.
    """

    path: str
    keys: list[Verdict]
    refused: list[str]
    missing: list[str]
    notes: list[str]


def diagnose(config: Path | None, overrides: Sequence[str], as_json: bool) -> int:
    """Print what is found. Returns the exit code: 2 if a run could not begin here, or not with this configuration.

    config: None for the shipped one, of which nothing is said unless there are overrides.
    Raises ConfigError if the configuration cannot be read.
    """
    review = review_config(config or config_dir() / "gpt_spin.yaml", overrides) if config or overrides else None
    found = components()
    is_well = not any(one.is_wrong for one in found) and not (review and review.refused)
    if as_json:
        print(json.dumps({"ok": is_well, "environment": [*map(asdict, found)], "config": review and asdict(review)}))
    else:
        print(_environment_for_people(found))
        if review is not None:
            print("\n" + _config_for_people(review))
    return 0 if is_well else EXIT_CODE


def review_config(path: Path, overrides: Sequence[str] = ()) -> ConfigReview:
    """Judge every key of a file, composed by hydra with overrides as on a run's command line. Raises ConfigError."""
    cfg = with_defaults(_composed(path, overrides))
    plain, refused = _resolved_as_far_as_possible(cfg)
    _, errors = judged(plain)
    missing = [error for error in errors if isinstance(error, MissingKeyError)]
    refused |= {error.key or "": str(error) for error in errors if error not in missing}
    lacking = [error.key or str(error) for error in missing]
    given = OmegaConf.to_container(_composed(path, overrides), resolve=False)
    return ConfigReview(
        str(path),
        [_completed(verdict, refused, lacking, given) for verdict in verdicts(plain) if _is_in(verdict.key, given)],
        list(refused.values()),
        lacking,
        sizes_not_given(plain),
    )


def _composed(path: Path, overrides: Sequence[str]) -> DictConfig:
    from hydra import compose, initialize_config_dir

    if not path.is_file() or path.suffix not in (".yaml", ".yml"):
        raise ConfigError(f"{path} is not a YAML file: name one.")
    with composing(str(path)), initialize_config_dir(str(path.resolve().parent), version_base="1.1"):
        return compose(
            path.name if path.suffix == ".yml" else path.stem,
            with_shipped_configurations(addable_overrides(overrides)),
        )


def _resolved_as_far_as_possible(cfg: DictConfig) -> tuple[dict[str, Any], dict[str, str]]:
    """The plain configuration, and for each key that cannot be resolved, and is null instead, why not."""
    refused: dict[str, str] = {}
    while True:
        try:
            return resolved(cfg), refused
        except ConfigError as error:
            if error.key is None or error.key in refused:
                raise
            refused[error.key] = str(error)
            OmegaConf.update(cfg, error.key, None, force_add=True)


def _completed(
    verdict: Verdict, refused: Mapping[str, str], missing: Sequence[str], given: Mapping[str, Any]
) -> Verdict:
    """A verdict with what only parsing finds out, and with the text of what the checkpoint alone can tell."""
    if verdict.key in refused:
        return Verdict(verdict.key, verdict.value, REFUSED, refused[verdict.key])
    if verdict.key in missing:
        return Verdict(verdict.key, None, TO_BE_GIVEN, "")
    text = at(given, verdict.key)
    if verdict.value is None and isinstance(text, str) and "model.encoder_seq_length" in text:
        return Verdict(verdict.key, text, verdict.verdict, "with the length that the checkpoint says")
    return verdict


def _is_in(key: str, cfg: Mapping[str, Any]) -> bool:
    section, _, name = key.rpartition(".")
    node = at(cfg, section) if section else cfg
    return isinstance(node, Mapping) and name in node


def _environment_for_people(found: Sequence[Component]) -> str:
    width = max(len(one.name) for one in found)
    versions = max(len(one.version or "") for one in found)
    lines = [
        f"  {one.state:<7}  {one.name:<{width}}  {one.version or '':<{versions}}  {one.says}".rstrip() for one in found
    ]
    wrong = [one.name for one in found if one.is_wrong]
    conclusion = f"A run cannot begin here before this is put right: {', '.join(wrong)}."
    return "\n".join(["Environment", *lines, *(["", conclusion] if wrong else [])])


def _config_for_people(review: ConfigReview) -> str:
    parts = [f"Configuration {review.path}", ""]
    for verdict in VERDICTS:
        keys = [key for key in review.keys if key.verdict == verdict]
        if keys:
            parts += [f"{verdict} ({len(keys)})", *map(_line, keys), ""]
    named = {key.key for key in review.keys} | {key.says for key in review.keys}
    parts += [f"  {sentence}" for sentence in review.refused if sentence not in named]
    parts += [f"  {key} is to be given" for key in review.missing if key not in named]
    parts += [f"note: {note}" for note in review.notes]
    return "\n".join([*parts, _conclusion(review)])


def _line(found: Verdict) -> str:
    if found.verdict == REFUSED:
        return f"  {found.says}"
    if found.verdict == TO_BE_GIVEN:
        return f"  {found.key}"
    mark = {TRANSLATED_TO: "  ->  ", NO_EFFECT: ": "}.get(found.verdict, "  # ")
    return f"  {found.key} = {in_words(found.value)}" + (f"{mark}{found.says}" if found.says else "")


def _conclusion(review: ConfigReview) -> str:
    if review.refused:
        return f"A run would refuse this configuration, for {len(review.refused)} of its keys."
    return "A run would accept this configuration" + (", once what is missing is given." if review.missing else ".")
