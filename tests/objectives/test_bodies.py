"""An objective's file reads like its equation."""

import ast
from pathlib import Path

OBJECTIVES = Path(__file__).parents[2] / "objectives"


def registered(node: ast.AST) -> bool:
    decorators = node.decorator_list if isinstance(node, ast.ClassDef) else []
    return any(ast.unparse(each).startswith("register(") for each in decorators)


def test_the_rows_or_sums_of_each_objective_take_at_most_twelve_lines():
    found = {}
    for path in sorted(OBJECTIVES.rglob("*.py")):
        for own in filter(registered, ast.walk(ast.parse(path.read_text()))):
            bodies = [
                f.body
                for f in ast.walk(own)
                if isinstance(f, ast.FunctionDef) and f.name in ("rows", "sums")
            ]
            lines = [
                line for body in bodies for step in body for line in ast.unparse(step).splitlines()
            ]
            found[path.name] = len(list(filter(None, lines)))
    assert len(found) == 11 and max(found.values()) <= 12, found
