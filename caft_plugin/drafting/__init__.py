"""Faster generation: heads draft, the model verifies."""
