"""The code that decides a number, so that what an earlier version made is made anew."""

from __future__ import annotations

import ast
import inspect
from types import ModuleType
from typing import Any

DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def code_of(what: ModuleType | type[Any]) -> str:
    """Return a module's or class's statements as text, without comments and docstrings.

    Notes
    -----
    As Python writes them again: a tree's own text differs from one version of Python to the next.
    """
    tree = ast.parse(inspect.getsource(what))
    for node in ast.walk(tree):
        if isinstance(node, DOCUMENTED) and _is_text(node.body[0]):
            node.body = node.body[1:] or [ast.Pass()]
    return ast.unparse(tree)


def _is_text(statement: ast.stmt) -> bool:
    if not isinstance(statement, ast.Expr) or not isinstance(statement.value, ast.Constant):
        return False
    return isinstance(statement.value.value, str)
