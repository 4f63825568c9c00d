"""The documents are true where a machine can tell: links, names of code, examples, the table of configuration keys."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.config import Config, from_tree, load

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
LINK = re.compile(r"!?\[([^\]]*)\]\(([^)\s]+)\)")
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def links(page: Path) -> Iterator[tuple[str, str]]:
    """Text and target of each link outside of code blocks that does not leave the repository."""
    for text, target in LINK.findall(BLOCK.sub("", page.read_text(encoding="utf-8"))):
        if "://" not in target and not target.startswith("mailto:"):
            yield text, target


def anchors(page: Path) -> set[str]:
    """The headings as GitHub names them."""
    headings = re.findall(r"^#+ (.+)$", BLOCK.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def blocks(page: Path, language: str) -> list[str]:
    return [code for kind, code in BLOCK.findall(page.read_text(encoding="utf-8")) if kind == language]


@each_page
def test_links_lead_somewhere(page: Path) -> None:
    dead = []
    for _, target in links(page):
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            dead.append(target)
    assert not dead


@each_page
def test_names_of_code_are_in_the_files_they_link_to(page: Path) -> None:
    """[`Class.method`](file.py): the last part must be a word of that file."""
    missing = []
    for text, target in links(page):
        name = re.fullmatch(r"`([\w.]+)`", text)
        if name and target.endswith((".py", ".proto")) and "." + name[1].rpartition(".")[2] != ".py":
            word = name[1].rpartition(".")[2]
            if not re.search(rf"\b{re.escape(word)}\b", (page.parent / target).read_text(encoding="utf-8")):
                missing.append((text, target))
    assert not missing


@each_page
def test_examples_parse(page: Path) -> None:
    for code in blocks(page, "python"):
        ast.parse(code)
    for code in blocks(page, "yaml"):
        yaml.safe_load(code)


def test_the_readmes_configuration_is_one() -> None:
    examples = blocks(ROOT / "README.md", "yaml")
    assert examples
    for code in examples:
        from_tree(yaml.safe_load(code), "README.md")


@pytest.mark.parametrize("file", sorted((ROOT / "deploy").glob("*.yaml")), ids=lambda file: file.name)
def test_deploy_files_load(file: Path) -> None:
    load(file)


def test_the_readmes_table_is_the_configuration() -> None:
    """Every key once, with the default that it has."""
    told: dict[str, Any] = {}
    for line in (ROOT / "README.md").read_text(encoding="utf-8").splitlines():
        row = re.match(r"\| ((?:`[a-z]+\.\w+`(?:, )?)+) \| `([^`]*)` \|", line)
        if row:
            for key in re.findall(r"`([^`]+)`", row[1]):
                assert key not in told, f"{key} is told twice"
                told[key] = yaml.safe_load(row[2])
    has = {f"{name}.{key}": value for name, section in Config() for key, value in section}
    assert told == json.loads(json.dumps(has))
