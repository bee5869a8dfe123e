"""Counts the core: lines of code, and all lines.

    python docs/core_size.py

Code is every line that holds a token other than a comment or a docstring; a statement over three lines counts three.
"""

from __future__ import annotations

import ast
import io
import tokenize
from pathlib import Path

SOURCE = Path(__file__).resolve().parent.parent / "core" / "src"
TESTING = SOURCE / "clipgraft" / "testing"
SILENT = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}


def code_lines(text: str) -> int:
    """Lines of ``text`` with code on them."""
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    lines = {n for t in tokens if t.type not in SILENT for n in range(t.start[0], t.end[0] + 1)}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            lines -= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return len(lines)


def main() -> None:
    """Print the numbers of what runs and of what judges plugins."""
    for title, inside in (("core", False), ("clipgraft.testing", True)):
        texts = [path.read_text("utf-8") for path in SOURCE.rglob("*.py") if (TESTING in path.parents) == inside]
        code, everything = sum(map(code_lines, texts)), sum(len(text.splitlines()) for text in texts)
        print(f"{title}: {len(texts)} files, {code} lines of code, {everything} with docstrings, comments and blanks")


if __name__ == "__main__":
    main()
