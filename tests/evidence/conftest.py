"""The benchmarks import one another as scripts do."""

import sys

from places import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
