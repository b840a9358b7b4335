"""NeMo's `prompt_template`: text with {placeholders}, cut into the strings that are tokenized one by one.

The same semantics as NeMo's GPTSFTDataset, so that a model meets the token ids that it was fine-tuned on.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from nemo_spin.errors import ConfigError

DEFAULT_TEMPLATE = "{input} {output}"
DEFAULT_LABEL_KEY = "output"

_PLACEHOLDER = re.compile(r"( *)\{([^{}\n]+)\}")
_ESCAPE = re.compile(r"\\(?:[nrt\\'\"]|x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4})")


@dataclass(frozen=True, slots=True)
class Part:
    """Literal text (key is None), or a placeholder with the spaces before it as its text."""

    text: str
    key: str | None


def check_template(template: str, label_key: str) -> None:
    """Raise ConfigError unless the template is well-formed and ends with the label's only placeholder."""
    parse_template(template, label_key)


def parse_template(template: str, label_key: str) -> tuple[Part, ...]:
    """Cut a template into its parts; the label is the last one.

    Backslash escapes (a literal \\n from a command line) are resolved. Raises ConfigError.
    """
    if not isinstance(template, str):
        raise ConfigError(f"prompt_template must be a string, not {type(template).__name__}")
    text = unescape(template)
    parts: list[Part] = []
    end = 0
    for match in _PLACEHOLDER.finditer(text):
        if match.start() > end:
            parts.append(Part(text[end : match.start()], None))
        parts.append(Part(match[1], match[2]))
        end = match.end()
    tail = text[end:]

    label = f"{{{label_key}}}"
    where = f"prompt_template {template!r}"
    if any(brace in part.text for part in [*parts, Part(tail, None)] for brace in "{}"):
        raise ConfigError(f"{where} has an unmatched, nested or empty brace: write placeholders as {{key}}")
    for key in filter(None, (part.key for part in parts)):
        if key != key.strip():
            raise ConfigError(f"{where} has spaces inside {{{key}}}: write {{{key.strip()}}}")
    labels = [part.key for part in parts].count(label_key)
    if not labels:
        raise ConfigError(f"{where} lacks {label}, the placeholder of label_key: add it at the end, or set label_key")
    if tail or parts[-1].key != label_key:
        raise ConfigError(f"{where} must end with {label}: nothing may follow the label")
    if labels > 1:
        raise ConfigError(f"{where} has {label} {labels} times: the label may only stand at the end")
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ConfigError(f"{where} holds half of a surrogate pair: write the character itself")
    return tuple(parts)


def unescape(text: str) -> str:
    """The text with backslash escapes, such as a literal \\n from a command line, resolved."""
    return _ESCAPE.sub(lambda escape: escape[0].encode("ascii").decode("unicode_escape"), text)


def check_truncation_field(names: str, template: str, label_key: str) -> frozenset[str]:
    """The fields that `truncation_field` names, with commas between them.

    Raises ConfigError for one that is no field of the prompt: a response is never cut.
    """
    fields = frozenset(name.strip() for name in names.split(",") if name.strip())
    context = [part.key for part in parse_template(template, label_key)[:-1] if part.key]
    for field in sorted(fields):
        if field not in context:
            raise ConfigError(
                f"truncation_field {field!r} is not a field of the prompt: name some of "
                f"{', '.join(context) or 'those that prompt_template has before the label'}"
            )
    return fields
