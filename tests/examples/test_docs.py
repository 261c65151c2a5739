"""What the pages say exists: commands with their options, scripts, links."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main

import act_export
from act_export.commands.main import DEFAULT_COMMAND, app

ROOT = Path(__file__).parent.parent.parent
DOCS = Path(act_export.__file__).parent / "docs"
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "models" / "README.md", *DOCS.glob("*.md")])
OTHERS = {"lm-eval"}  # whose options are another package's
AFTER = re.compile(r"\s(?:\d?>|\||&&|;|#)\s?|\s{3,}")  # another command, or what is said of it


def page_id(page: Path) -> str:
    return str(page.relative_to(page.parent.parent))


def commands_of(text: str) -> Iterator[str]:
    """All act-export commands of a page, in blocks and in lines."""
    fenced = re.sub(r"^```(?!sh|bash).*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
    blocks = re.findall(r"(?:^(?: {4}|\t).*\n?)+", fenced, re.MULTILINE)
    lines = [line for block in blocks for line in re.sub(r"\\\n\s*", " ", block).splitlines()]
    lines += [re.sub(r"\s+", " ", code) for code in re.findall(r"`([^`]+)`", fenced)]
    for line in lines:
        found = re.match(r"\s*(?:(?:time|/usr/bin/time -v|torchrun \S+( \S+)*? -m|[A-Z_]+=\S+) )*act-export (.+)", line)
        if found and "..." not in found[2] and "…" not in found[2]:
            yield AFTER.split(f"{found[2]} ")[0].strip()


def parsing_error(command: Any, name: str, words: list[str]) -> str:
    """Why the words aren't understood; empty where they are."""
    try:
        command.make_context(name, words)
    except Exception as error:  # of typer's own copy of click
        return "" if type(error).__name__ == "Exit" else str(error)
    return ""


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_commands_and_their_options_exist(page: Path) -> None:
    group: Any = typer.main.get_command(app)
    wrong = []
    for line in commands_of(page.read_text(encoding="utf-8")):
        words = shlex.split(line.replace("[", "").replace("]", ""))
        if words[0].startswith("--") or words[0] in OTHERS:
            continue
        name = words.pop(0) if words[0] in group.commands else DEFAULT_COMMAND
        error = parsing_error(group.commands[name], name, words)
        if error and not error.startswith("Missing parameter"):  # a line that only names the command
            wrong.append(f"act-export {line}: {error}")
    assert wrong == []


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_scripts_and_their_options_exist(page: Path) -> None:
    text = re.sub(r"\\\n\s*", " ", page.read_text(encoding="utf-8"))
    for script, rest in re.findall(r"((?:tools|tests)/[\w/]+(?:\.py)?)((?: [^`\n]*)?)", text):
        if "NAME" in script:
            continue
        path = ROOT / script
        assert path.exists(), f"{page.name}: {script}"
        if path.suffix == ".py" and path.is_relative_to(ROOT / "tools"):
            source = path.read_text(encoding="utf-8")
            for option in re.findall(r" (--[a-z][a-z-]+)", rest.split(" `")[0]):
                assert f'"{option}"' in source, f"{page.name}: {script} {option}"


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https?://|mailto:)([^)\s]+)\)", text):
        name, _, anchor = target.partition("#")
        path = page.parent / name if name else page
        assert path.exists(), f"{page.name}: {target}"
        if anchor and path.suffix == ".md":
            titles = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}, target


def test_every_page_is_in_the_index() -> None:
    index = (DOCS / "README.md").read_text(encoding="utf-8")
    for page in DOCS.glob("*.md"):
        assert page.name == "README.md" or f"]({page.name})" in index, page.name


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= 800
