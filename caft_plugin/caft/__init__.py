"""Auxiliary heads: their loss, and their files."""
