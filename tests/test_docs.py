"""The documentation names files that exist, and README stays short."""

import re
from pathlib import Path

import pytest
from model_errors import MODELS
from model_shapes import PRESETS

from pymla.models.metadata import NOT_RUN

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


def test_every_model_is_listed():
    """Presets, a row of errors for each that is built in another way, and architectures that do not run."""
    text = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    named = {*(PRESETS.keys() - {"tiny"}), *NOT_RUN}
    assert not [name for name in sorted(named) if f"`{name}`" not in text]
    rows = re.findall(r"^\| (\S+) \| \w+ \| (?:reference|cpu) \|", text, re.MULTILINE)
    assert rows == [name for name in MODELS for _ in ("reference", "cpu")]
