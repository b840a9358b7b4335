"""What becomes of each key of a configuration: honoured, translated, of no effect, to be given yet, or refused."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from nemo_spin.config.aligner.table import TABLE
from nemo_spin.config.aligner.translate import translations, without_effect
from nemo_spin.config.keys import KEYS, problems
from nemo_spin.config.reading import at
from nemo_spin.config.values import MISSING, in_words

HONOURED, TRANSLATED_TO, NO_EFFECT, TO_BE_GIVEN, REFUSED = VERDICTS = (
    "honoured",
    "translated",
    "no effect",
    "to be given",
    "refused",
)
_SIZES = ("model.tensor_model_parallel_size", "model.pipeline_model_parallel_size")


@dataclass(frozen=True, slots=True)
class Verdict:
    """What becomes of a key.

    verdict: one of `VERDICTS`. A run says nothing of what is honoured, notes what is translated or of no effect, and
        does not begin while something is refused or to be given.
    says: what is so instead, or why; empty where a key just means what it says.
    """

    key: str
    value: Any
    verdict: str
    says: str


def verdicts(cfg: Mapping[str, Any]) -> list[Verdict]:
    """One for each key of a resolved configuration, in its order; values are not checked but those of unread keys."""
    wrong = {error.key: str(error) for error in problems(cfg)}
    translated = {found.key: f"{found.target} = {in_words(found.becomes)}" for found in translations(cfg)}
    idle = without_effect(cfg)

    def verdict_on(key: str, value: Any) -> Verdict:
        if key in wrong:
            return Verdict(key, value, REFUSED, wrong[key])
        if key in translated:
            return Verdict(key, value, TRANSLATED_TO, translated[key])
        if key in idle:
            return Verdict(key, value, NO_EFFECT, idle[key])
        if key in TABLE and value is not None:
            return Verdict(key, value, TABLE[key].verdict(value, cfg), TABLE[key].reason)
        return Verdict(key, value, HONOURED, "")

    return [verdict_on(key, value) for key, value in _keys(cfg)]


def notices(cfg: Mapping[str, Any]) -> list[str]:
    """What a run should say of its resolved configuration when it begins, a line each: the keys that are translated or
    of no effect, those with the same reason together."""
    lines, reasons = [], {}
    for found in verdicts(cfg):
        given = f"{found.key} = {in_words(found.value)}"
        if found.verdict == TRANSLATED_TO:
            lines.append(f"{given} is taken as {found.says}")
        elif found.verdict == NO_EFFECT:
            reasons.setdefault(found.says, []).append(given)
    for reason, given in reasons.items():
        lines.append(f"{_listed(given)} {'has' if len(given) == 1 else 'have'} no effect: {reason}")
    return lines + sizes_not_given(cfg)


def sizes_not_given(cfg: Mapping[str, Any]) -> list[str]:
    """A line if the layout is left open."""
    sizes = [key for key in _SIZES if at(cfg, key) is None]
    verb = "is" if len(sizes) == 1 else "are"
    taken = "not given: the checkpoint's is taken, as NeMo-Aligner does, and 1 where it has none"
    return [f"{_listed(sizes)} {verb} {taken}"] if sizes else []


def _keys(cfg: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Full keys with values: of the sections of `KEYS` each key, of other mappings (a logger's) only their name."""

    def below(section: str, values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
        for name, value in values.items():
            key = f"{section}.{name}".lstrip(".")
            if key in KEYS and isinstance(value, Mapping):
                yield from below(key, value)
            else:
                yield key, None if isinstance(value, str) and value == MISSING else value

    return below("", cfg)


def _listed(texts: list[str]) -> str:
    return " and ".join(filter(None, [", ".join(texts[:-1]), texts[-1]]))
