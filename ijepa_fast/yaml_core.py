"""YAML as a config file means it: the types of YAML 1.2's core schema, no key twice, and no file that explodes.

PyYAML reads YAML 1.1, where 010 is 8, 1:30 is 90, no is false, 2026-11-25 is a date and 1e-3 is text; and it lets the
last of two equal keys win. https://yaml.org/spec/1.2.2/#103-core-schema
"""
import re
from typing import Any

import yaml

MOST_DIGITS = 40  # of a number; no key means a longer one


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012 (as in the base class)

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Only single values may be aliased: aliases of lists of aliases grow without bound when they are expanded."""
        alias = self.check_event(yaml.AliasEvent) and self.peek_event()
        node = super().compose_node(parent, index)
        if alias and not isinstance(node, yaml.ScalarNode):
            raise _refused(f"*{alias.anchor} stands for more than one value; write it out", alias.start_mark)
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: dict[str, yaml.Node] = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and (first := seen.setdefault(key.value, key)) is not key:
                raise _refused(f"{key.value} is given twice, first in line {first.start_mark.line + 1}", key.start_mark)
        return super().construct_mapping(node, deep)


def _int(loader: Any, node: yaml.ScalarNode) -> int:
    if len(node.value) > MOST_DIGITS:
        raise _refused(f"a number of {len(node.value)} digits", node.start_mark)
    return int(node.value, {"0o": 8, "0x": 16}.get(node.value[:2], 10))


def _float(loader: Any, node: yaml.ScalarNode) -> float:
    return float(node.value.lower().replace(".inf", "inf").replace(".nan", "nan"))


class _Dumper(yaml.SafeDumper):
    """Quotes what either version of YAML would take for something else than text."""


def _refused(problem: str, mark: Any) -> yaml.YAMLError:
    return yaml.constructor.ConstructorError(None, None, problem, mark)


for tag, pattern, first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+0123456789."),
    ),
):
    for reader_or_writer in (_Loader, _Dumper):
        reader_or_writer.add_implicit_resolver(f"tag:yaml.org,2002:{tag}", re.compile(f"(?:{pattern})$"), first)
_Loader.add_constructor("tag:yaml.org,2002:int", _int)
_Loader.add_constructor("tag:yaml.org,2002:float", _float)
del _Loader.yaml_constructors["tag:yaml.org,2002:timestamp"]  # a class has its own table once something was added


def parse(text: str) -> Any:
    """The value of a YAML text. Raises ValueError with a sentence on what is wrong and, where known, the line."""
    try:
        return yaml.load(text, _Loader)
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}: " if mark else ""
        raise ValueError(f"{where}{error.problem or error}") from None
    except yaml.YAMLError as error:  # a character that YAML does not allow
        raise ValueError(" ".join(str(error).split())) from None


def dump(value: Any) -> str:
    """A YAML text that `parse` reads as `value`, keys in their order."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False)
