"""Mask-enhanced autoregressive prediction (MEAP): copies, masks and the mask token."""
