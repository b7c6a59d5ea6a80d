"""Files of tests that take long, each in a process of its own, where all tests run."""

import sys
from pathlib import Path

import pytest
import side_by_side

HERE = Path(__file__).parent


def run(name):
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(HERE / name)]
    return side_by_side.run(command, cwd=HERE.parent)


@pytest.mark.parametrize("name", side_by_side.FILES)
@pytest.mark.side_by_side(run=run)
def test_file(name, beside):
    assert beside.returncode == 0, beside.stdout[-5000:] + beside.stderr[-2000:]
    assert " passed" in beside.stdout, beside.stdout
