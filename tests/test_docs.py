"""The documentation names files that exist, and README stays short."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted(path.relative_to(ROOT) for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")))
FOLDERS = "pymla|tests|tools|bench|docs|examples"


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_links_lead_somewhere(page):
    prose = re.sub(r"```.*?```|`[^`\n]*`", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.DOTALL)
    targets = re.findall(r"\]\(([^)#]+)", prose)
    local = {target for target in targets if not target.startswith("http")}
    assert not [target for target in sorted(local) if not (ROOT / page.parent / target).exists()]


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_named_files_exist(page):
    named = set(re.findall(rf"`((?:{FOLDERS})/[\w./-]+)`", (ROOT / page).read_text(encoding="utf-8")))
    assert not [name for name in sorted(named) if not (ROOT / name).exists()]


def test_readme_is_short():
    """Its first two commands install and test: `.ci/run` takes them from there."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) < 150
    commands = [line for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL) for line in block.splitlines()]
    assert "pip install . " in commands[0]
    assert commands[1].endswith("python -m pytest")
