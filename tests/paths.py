from pathlib import Path

ROOT = Path(__file__).parent.parent
GOLDENS = Path(__file__).parent / "goldens"
