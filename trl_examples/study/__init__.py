"""Studies of what CAFT and MEAP bring: `python -m study run`, `python -m study report` (see
README.md)."""
