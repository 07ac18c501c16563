"""The YAML dialect of sweep files: plain types, `1e-3` as a number, duplicate keys rejected."""

from __future__ import annotations

import re
from typing import Any

import yaml

from nipq_search.errors import UserError

_MERGE = "tag:yaml.org,2002:merge"


class _Loader(yaml.SafeLoader):
    """YAML loader that parses `1e-3` as a number and rejects duplicate string keys."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        """Construct a mapping; reject duplicate string keys, of which PyYAML keeps the last."""
        seen = set()
        for key_node, _ in node.value:
            if key_node.tag == _MERGE:
                continue
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, str):
                if key in seen:
                    raise yaml.constructor.ConstructorError(
                        problem=f"duplicate key '{key}'", problem_mark=key_node.start_mark
                    )
                seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[0-9][0-9_]*(?:\.[0-9_]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def parse_yaml(text: str, source: str) -> Any:
    """Parse a YAML document, and return it as plain types.

    Args:
        text: YAML text.
        source: origin of the text, for error messages.

    Raises:
        UserError: the text is not valid YAML; the message names the line if it is known.
    """
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f" line {mark.line + 1}" if mark else ""
        reason = getattr(error, "problem", None) or "not valid YAML"
        raise UserError(f"{source}:{place} {reason}") from error
    except (ValueError, AttributeError, TypeError, RecursionError) as error:
        # Malformed values that resemble dates or numbers, or excessive nesting.
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{source}: not valid YAML ({reason})") from error
