"""The code that decides a number, so that what an earlier version made is made anew."""

from __future__ import annotations

import ast
import inspect
from types import ModuleType
from typing import Any


def code_of(what: ModuleType | type[Any]) -> str:
    """Return a module's or class's syntax tree as text; comments and docstrings decide nothing."""
    tree = ast.parse(inspect.getsource(what))
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and isinstance(body[0], ast.Expr):
            node.body = body[1:] or [ast.Pass()]  # type: ignore[attr-defined]
    return ast.dump(tree)
