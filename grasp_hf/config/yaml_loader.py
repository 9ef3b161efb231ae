"""YAML from files: a key occurs once, and a small text stays small when its aliases are written out."""

from typing import Any

import yaml

LARGEST_TEXT = 150_000  # characters; PyYAML needs seconds for as many
LARGEST_TREE = 50_000  # values, keys, lists and sections


class _Loader(yaml.SafeLoader):
    """Refuses a key that occurs twice, of which YAML would keep only the last value, and aliases that multiply."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        seen = set()
        for key in keys:
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"the key '{key}' occurs twice", node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)

    def get_single_node(self) -> Any:
        node = super().get_single_node()
        if node is not None and _expanded_size(node, {}) > LARGEST_TREE:
            raise yaml.composer.ComposerError(None, None, f"it holds more than {LARGEST_TREE} values", node.start_mark)
        return node


def _expanded_size(node: yaml.Node, sizes: dict[int, int | None]) -> int:
    """Return the number of nodes in a tree whose aliases are written out; `sizes` keeps those of the nodes seen."""
    known = sizes.get(id(node), 0)
    if known is None:
        raise yaml.composer.ComposerError(None, None, "it holds an alias of itself", node.start_mark)
    if known:
        return known
    sizes[id(node)] = None
    children: list[yaml.Node] = []
    if isinstance(node, yaml.MappingNode):
        children = [child for pair in node.value for child in pair]
    elif isinstance(node, yaml.SequenceNode):
        children = node.value
    size = 1 + sum(_expanded_size(child, sizes) for child in children)
    sizes[id(node)] = size
    return size


def load_yaml(text: str) -> Any:
    """Return the content of a YAML text.

    Raises:
        YAMLError: The text is no YAML, has a key twice, or is too large or too deep.
    """
    if len(text) > LARGEST_TEXT:
        raise yaml.YAMLError(f"it has {len(text):,} characters, expected at most {LARGEST_TEXT:,}")
    try:
        return yaml.load(text, _Loader)
    except RecursionError as error:
        raise yaml.YAMLError("it has too many levels") from error
    except (ValueError, TypeError, AttributeError, LookupError, OverflowError) as error:  # such as a date of month 13
        raise yaml.YAMLError(f"a value cannot be read: {error}") from error
