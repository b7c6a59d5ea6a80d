"""Tests import the scripts of tools/ and bench/, and the helpers beside them."""

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), *(str(HERE.parent / folder) for folder in ("tools", "bench"))]
