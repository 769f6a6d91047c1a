"""Dotted names as a tree: of modules with their margins, or of the tensors of a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Generic, TypeVar

Value = TypeVar("Value")


@dataclass(slots=True)
class Node(Generic[Value]):
    """A name and what is below it.

    Attributes:
        name: Its last part, or several where nothing else is between them.
        path: The whole name; empty for the root.
        value: What is known under this name; None where it only stands above others.
        children: In the order of their first appearance.
    """

    name: str
    path: str
    value: Value | None = None
    children: list[Node[Value]] = field(default_factory=list)

    def walk(self) -> Iterator[Node[Value]]:
        """Yield this node and all below it."""
        yield self
        for child in self.children:
            yield from child.walk()

    @property
    def is_list(self) -> bool:
        """Whether it is nothing but a list, such as a ModuleList of layers."""
        return self.value is None and bool(self.children) and all(child.name.isdigit() for child in self.children)


def tree_of(values: Mapping[str, Value]) -> Node[Value]:
    """Return the tree of these names, in their order; the empty name is that of the root.

    Example:
        >>> root = tree_of({"model.layers.0.mlp": 1, "model.layers.0.norm": 2, "lm_head": 3})
        >>> [(node.path, node.value) for node in root.walk()][3:]
        [('model.layers.0', None), ('model.layers.0.mlp', 1), ('model.layers.0.norm', 2), ('lm_head', 3)]
    """
    nodes: dict[str, Node[Value]] = {"": Node("", "")}
    for path, value in values.items():
        _node_at(nodes, path).value = value
    return nodes[""]


def _node_at(nodes: dict[str, Node[Value]], path: str) -> Node[Value]:
    if path not in nodes:
        above, _, name = path.rpartition(".")
        nodes[path] = Node(name, path)
        _node_at(nodes, above).children.append(nodes[path])
    return nodes[path]


def joined(node: Node[Value]) -> Node[Value]:
    """Return a node with those above a single other one put together with it: `q_proj.weight`."""
    children = [joined(child) for child in node.children]
    if node.path and node.value is None and len(children) == 1:
        (child,) = children
        return Node(f"{node.name}.{child.name}", child.path, child.value, child.children)
    return Node(node.name, node.path, node.value, children)


def without_lists(node: Node[Value]) -> Iterator[tuple[str, Node[Value]]]:
    """Yield the children by name, those of a list in its place: `layers.0`, `layers.1`."""
    for child in node.children:
        if child.is_list:
            yield from ((f"{child.name}.{name}", below) for name, below in without_lists(child))
        else:
            yield child.name, child
