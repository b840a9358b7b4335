"""YAML and JSON files of strangers, as plain data and within limits.

No tag makes an object, no alias writes out more than a file may hold, and what is too large or too deep is an error
with a reason, where the libraries would run out of stack or memory.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml

from nemo_spin.errors import CheckpointError, one_line

# A configuration of NeMo or transformers has some 10 KB, the index of a large model's weights 2 MB, a hundred values,
# and is five levels deep.
LARGEST_YAML = 2 * 2**20
LARGEST_JSON = 16 * 2**20
MOST_VALUES = 200_000
DEEPEST = 64
# Whole numbers: any that is a float as well. transformers writes 10^30 for "no limit".
_LARGEST_NUMBER = 10**300


class PlainDataError(ValueError):
    """Why a file is no plain data, in a few words on one line."""


def read_yaml(file: Path) -> Any:
    """The content of a YAML file. Raises PlainDataError, and OSError if it cannot be read."""
    text = _read(file, LARGEST_YAML)
    try:
        return yaml.load(text, _Loader)
    except RecursionError:
        raise PlainDataError(f"it is nested more than {DEEPEST} deep") from None
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        raise PlainDataError(" ".join(str(error).split())[:500]) from None


def read_json(file: Path) -> Any:
    """The content of a JSON file. Raises PlainDataError, and OSError if it cannot be read."""
    text = _read(file, LARGEST_JSON)
    try:
        loaded = json.loads(text, parse_int=_whole_number)
    except RecursionError:
        raise PlainDataError(f"it is nested more than {DEEPEST} deep") from None
    except ValueError as error:
        raise PlainDataError(" ".join(str(error).split())[:500]) from None
    _check_depth(loaded)
    return loaded


def read_mapping(file: Path, called: str) -> dict[str, Any]:
    """The mapping that a YAML or JSON file holds.

    called: what the file is called in messages. Raises CheckpointError if it cannot be read, or holds something else.
    """
    try:
        loaded = read_json(file) if file.suffix == ".json" else read_yaml(file)
    except (PlainDataError, OSError) as error:
        raise CheckpointError(f"{called} cannot be read as plain data: {one_line(error)}.") from None
    if not isinstance(loaded, dict):
        raise CheckpointError(f"{called} is no mapping.")
    return loaded


def _read(file: Path, largest: int) -> str:
    if not file.is_file() and file.exists():
        raise PlainDataError("it is no file")
    with open(file, "rb") as opened:
        content = opened.read(largest + 1)
    if len(content) > largest:
        raise PlainDataError(f"it is larger than {largest / 2**20:.0f} MiB")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise PlainDataError(" ".join(str(error).split())) from None


def _whole_number(digits: str) -> int:
    number = int(digits) if len(digits) < 400 else _LARGEST_NUMBER
    if abs(number) >= _LARGEST_NUMBER:
        raise PlainDataError(f"it holds a number of {len(digits)} digits")
    return number


def _check_depth(loaded: Any) -> None:
    level = [loaded]
    for _ in range(DEEPEST):
        level = [item for each in level for item in _items(each)]
        if not level:
            return
    raise PlainDataError(f"it is nested more than {DEEPEST} deep")


def _items(value: Any) -> Any:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def _refusal(reason: str, mark: Any) -> yaml.YAMLError:
    return yaml.composer.ComposerError(None, None, reason, mark)


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with the limits above, and with floats as OmegaConf and YAML 1.2 write them (1e-5)."""

    def __init__(self, stream: Any) -> None:
        super().__init__(stream)
        self._depth = 0
        # Of each finished node: values in it, all aliases written out, and levels.
        self._measured: dict[int, tuple[int, int]] = {}

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            node = super().compose_node(parent, index)
            if id(node) not in self._measured:
                raise _refusal("it holds an alias to what it stands in", event.start_mark)
            return node
        self._depth += 1
        self._check(1, self._depth, event.start_mark)
        node = super().compose_node(parent, index)
        self._depth -= 1
        children = node.value if isinstance(node, yaml.SequenceNode) else []
        if isinstance(node, yaml.MappingNode):
            children = [part for pair in node.value for part in pair]
            self._check_keys(node)
        measured = [self._measured[id(child)] for child in children]
        size, levels = 1 + sum(size for size, _ in measured), 1 + max((levels for _, levels in measured), default=0)
        self._check(size, levels, event.start_mark)
        self._measured[id(node)] = size, levels
        return node

    def _check(self, size: int, levels: int, mark: Any) -> None:
        if levels > DEEPEST:
            raise _refusal(f"it is nested more than {DEEPEST} deep", mark)
        if size > MOST_VALUES:
            raise _refusal(f"it holds more than {MOST_VALUES} values", mark)

    def _check_keys(self, node: yaml.MappingNode) -> None:
        """Readers differ in which of two values counts."""
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
        if len(keys) != len(set(keys)):
            twice = next(key for key in keys if keys.count(key) > 1)
            raise _refusal(f"it gives {twice[:100]} twice", node.start_mark)

    def construct_yaml_int(self, node: Any) -> int:
        if len(node.value) > 400:
            raise PlainDataError(f"it holds a number of {len(node.value)} digits")
        return _whole_number(str(super().construct_yaml_int(node)))


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in ("tag:yaml.org,2002:float",)]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"[-+]?(?:(?:\d[\d_]*)\.[\d_]*(?:[eE][-+]?\d+)?|\d[\d_]*[eE][-+]?\d+|\.[\d_]+(?:[eE][-+]?\d+)?|\.(?:inf|Inf|INF))$"
        r"|\.(?:nan|NaN|NAN)$"
    ),
    list("-+0123456789."),
)
