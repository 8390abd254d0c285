"""Random training loops beside an explicit reference; `test_fuzz.py` runs them."""

import sys
from pathlib import Path

# As a script, `test_fuzz.py` tests the package that it lies in, whatever is installed.
sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[3])]
