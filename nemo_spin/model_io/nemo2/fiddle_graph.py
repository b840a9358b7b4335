"""A description of Python objects as the JSON in which fiddle 0.3 keeps a graph of configurations.

Every object of the graph is an entry of `objects`: a value of another object is a reference to one, a Python name
("pyref") or a plain value ("leaf"). A configuration keeps the names of its arguments apart from their values, in its
metadata. NeMo 2 finds a part of the graph by its `paths` ("<root>.model.config").
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_FIDDLE = "fiddle._src.config"


def fiddle_graph(description: Mapping[str, Any]) -> dict[str, Any]:
    """The graph of a description, ready for json.dump.

    description: mappings with `_target_` are configurations of that class or function; with `_call_: False` as well,
    the class or function itself; other mappings are dicts, and lists are lists. Everything else is a plain value.
    """
    graph = _Graph()
    root = graph.value(description, "<root>")
    counts = dict.fromkeys(graph.objects, 1)
    return {"root": root, "objects": graph.objects, "refcounts": counts, "version": "0.0.1"}


class _Graph:
    def __init__(self) -> None:
        self.objects: dict[str, Any] = {}

    def value(self, value: Any, path: str) -> dict[str, Any]:
        if isinstance(value, Mapping) and "_target_" in value:
            if value.get("_call_") is False:
                return _name(value["_target_"]) | {"paths": [path]}
            arguments = {key: argument for key, argument in value.items() if key not in ("_target_", "_call_")}
            items = [[f"Attr(name='{key}')", self.value(item, f"{path}.{key}")] for key, item in arguments.items()]
            return self._add(f"{_FIDDLE}.Config", items, self._metadata(value["_target_"], arguments), path)
        if isinstance(value, Mapping):
            items = [[f"Key(key='{key}')", self.value(item, f"{path}['{key}']")] for key, item in value.items()]
            return self._add("builtins.dict", items, self._tuple(value), path)
        if isinstance(value, (list, tuple)):
            items = [[f"Index(index={i})", self.value(item, f"{path}[{i}]")] for i, item in enumerate(value)]
            return self._add("builtins.list", items, None, path)
        return {"type": "leaf", "value": value, "paths": [path]}

    def _metadata(self, target: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
        kind = f"{_FIDDLE}.BuildableTraverserMetadata"
        fields = {
            "fn_or_cls": _name(target),
            "argument_names": self._tuple(arguments),
            "argument_tags": self._add("builtins.dict", [], self._tuple(())),
            "argument_history": self._add("builtins.dict", [], self._tuple(())),
        }
        return self._add(kind, [[f"Attr(name='{key}')", value] for key, value in fields.items()], _name(kind))

    def _tuple(self, names: Any) -> dict[str, Any]:
        return self._add("builtins.tuple", [[f"Index(index={i})", name] for i, name in enumerate(names)], None)

    def _add(self, kind: str, items: list[Any], metadata: Any, path: str | None = None) -> dict[str, Any]:
        key = f"{kind.rsplit('.', 1)[-1].lower()}_{len(self.objects) + 1}"
        entry = {"type": _name(kind), "items": items, "metadata": metadata}
        self.objects[key] = entry if path is None else entry | {"paths": [path]}
        return {"type": "ref", "key": key}


def _name(dotted: str) -> dict[str, Any]:
    module, _, name = dotted.rpartition(".")
    return {"type": "pyref", "module": module, "name": name}
