"""Changes to a recipe's file that leave the rest of it, comments too, as it was written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from journeyman.errors import RecipeError


class _Block(yaml.SafeDumper):
    """Texts of several lines as block literals."""


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    style = "|" if "\n" in value else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)


_Block.add_representer(str, _text)


def with_settings(
    source: str, section: tuple[str, ...], changes: Mapping[str, Any], comments: Sequence[str]
) -> str:
    """The file's text with some keys of a section set, and comments in front of its first key.

    section: its name, behind those of the sections that it is in. What a key was stays as a comment
    beside it. Raises RecipeError where the section is written in a way that cannot be changed line
    by line, with the lines to put there by hand.
    """
    wanted = yaml.safe_load(source)
    own = _at(wanted, section)
    found = _section(source, section)
    if found is None or found[0].flow_style or not found[0].value:
        if len(section) > 1:  # in one line, or not there: it is set as a key of the one around it
            return with_settings(source, section[:-1], {section[-1]: {**own, **changes}}, comments)
        raise _by_hand(section, changes)
    mapping, behind = found
    indent = " " * mapping.value[0][0].start_mark.column
    lines = source.split("\n")
    # From the end, so that line numbers in front stay true.
    starts = [key.start_mark.line for key, _ in mapping.value]
    limits = [*starts[1:], behind]
    keys = [
        (key.value, start, _end(value, limit, lines))
        for (key, value), start, limit in zip(mapping.value, starts, limits, strict=True)
    ]
    last = keys[-1][2]
    for name in reversed([name for name in changes if name not in {k for k, _, _ in keys}]):
        lines[last:last] = _dumped(name, changes[name], indent)
    for name, start, end in reversed(keys):
        if name in changes:
            was = [f"{indent}# was: {line.strip()}" for line in lines[start:end] if line.strip()]
            lines[start:end] = [*was, *_dumped(name, changes[name], indent)]
    first = keys[0][1]
    lines[first:first] = [f"{indent}# {comment}" for comment in comments]
    changed = "\n".join(lines)
    own |= _plain(changes)
    if yaml.safe_load(changed) != wanted:
        raise _by_hand(section, changes)
    return changed


def _at(values: Any, section: tuple[str, ...]) -> dict[str, Any]:
    """The section's own values, to be changed; empty where there are none."""
    for name in section:
        values = values.get(name) if isinstance(values, dict) else None
    return values if isinstance(values, dict) else {}


def _section(source: str, section: tuple[str, ...]) -> tuple[yaml.MappingNode, int] | None:
    """The section, and the line of what stands behind it; None where it is no mapping."""
    found = yaml.compose(source, Loader=yaml.SafeLoader)
    behind = source.count("\n") + 1
    for wanted in section:
        if not isinstance(found, yaml.MappingNode):
            return None
        names = [key.value for key, _ in found.value]
        if wanted not in names:
            return None
        place = names.index(wanted)
        if place + 1 < len(names):
            behind = found.value[place + 1][0].start_mark.line
        found = found.value[place][1]
    return (found, behind) if isinstance(found, yaml.MappingNode) else None


def _end(value: yaml.Node, limit: int, lines: Sequence[str]) -> int:
    """The line behind a value; blank lines and comments behind it are not the value's.

    limit: the line of what follows: a collection's own end mark is there, a text's where it ends.
    """
    is_text = isinstance(value, yaml.ScalarNode)
    end = value.end_mark.line + (value.end_mark.column > 0) if is_text else limit
    while end > value.start_mark.line + 1 and _is_nothing(lines[end - 1], is_text):
        end -= 1
    return end


def _is_nothing(line: str, in_text: bool) -> bool:
    return not line.strip() or (not in_text and line.lstrip().startswith("#"))


def _dumped(name: str, value: Any, indent: str) -> list[str]:
    text = yaml.dump(
        {name: _plain(value)}, Dumper=_Block, sort_keys=False, allow_unicode=True, width=10_000
    )
    return [f"{indent}{line}" if line else line for line in text.rstrip("\n").split("\n")]


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, tuple | list) else value


def _by_hand(section: tuple[str, ...], changes: Mapping[str, Any]) -> RecipeError:
    lines = "\n".join(line for name, v in changes.items() for line in _dumped(name, v, "  "))
    return RecipeError(
        f"{'.'.join(section)}: is written in a way that cannot be changed line by line; put there "
        f"by hand:\n{lines}"
    )
