"""The page of claims: composed from what ``clipgraft claims`` writes, and true to its own sections."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from clipgraft.registry import Registry

DOCS = Path(__file__).parent.parent / "docs"


@pytest.fixture
def tool(tmp_path, monkeypatch):
    """docs/claims_page.py over a page of its own."""
    spec = importlib.util.spec_from_file_location("claims_page", DOCS / "claims_page.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "PAGE", tmp_path / "docs" / "claims.md")
    (tmp_path / "docs").mkdir()
    return module


HEAD = (
    "# Claims\n\n| claim | verdict |\n|---|---|\n| `a/one` | holds, narrowly | x |\n| `b/two` | does not hold | y |\n\n"
)


def written(folder: Path, **verdicts: str) -> Path:
    """A folder as the command leaves it."""
    folder.mkdir()
    parts = []
    for name, verdict in verdicts.items():
        (folder / f"{name}.svg").write_text(f"plot of {name}")
        parts.append(f"## {name.replace('_', '/')}: {verdict}\n\nnew numbers\n\n![dots]({name}.svg)\n")
    (folder / "claims.md").write_text("# Claims\n\n" + "\n".join(parts))
    return folder


def test_sections_are_replaced_kept_and_added_and_plots_copied(tool, tmp_path):
    tool.PAGE.write_text(HEAD + "## a/one: holds\n\nold numbers\n\n## b/two: does not hold\n\nkept\n")
    tool.PAGE.write_text(tool.PAGE.read_text().replace("| y |\n", "| y |\n| `c/three` | undecided | z |\n"))
    assert tool.main([str(written(tmp_path / "out", a_one="holds", c_three="undecided"))]) == 0
    text = tool.PAGE.read_text()
    assert "old numbers" not in text and "kept" in text and text.count("new numbers") == 2
    assert [*tool.sections(text)] == ["a/one", "b/two", "c/three"] and text.startswith("# Claims")
    assert (tmp_path / "docs" / "a_one.svg").read_text() == "plot of a_one"


def test_a_table_that_tells_something_else_is_an_error(tool, tmp_path, capsys):
    tool.PAGE.write_text(HEAD + "## a/one: holds\n\n## b/two: does not hold\n")
    assert tool.main([str(written(tmp_path / "out", b_two="holds", c_three="holds"))]) == 1
    said = capsys.readouterr().err
    assert "b/two: the table says does not hold, its section holds" in said and "c/three has no row" in said


def test_a_folder_without_results_is_one_line(tool, tmp_path, capsys):
    assert tool.main([str(tmp_path)]) == 2
    assert "run clipgraft claims --out" in capsys.readouterr().err


def test_the_page_has_every_claim_and_its_table_tells_what_the_sections_tell(tool):
    text = (DOCS / "claims.md").read_text("utf-8")
    assert tool.problems(text) == []
    ours = {path.name for path in (DOCS.parent / "plugins").iterdir()}
    there = {claim.name for claim in Registry.discover().list("claim") if claim.plugin in ours}
    assert there == tool.sections(text).keys()
    for name, section in tool.sections(text).items():
        assert (DOCS / f"{name.replace('/', '-')}.svg").is_file() and f"{name.replace('/', '-')}.svg" in section
