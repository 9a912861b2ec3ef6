"""Where things are; and what has to be said to libraries before they are imported, which this
module is ahead of."""

import os
from pathlib import Path

ROOT = Path(__file__).parent.parent
GOLDENS = Path(__file__).parent / "goldens"

os.environ.setdefault("AXOLOTL_DO_NOT_TRACK", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
