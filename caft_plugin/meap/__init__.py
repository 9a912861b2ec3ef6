"""Mask-enhanced autoregressive prediction (MEAP): copies, masks, the mask token, and the attention report."""
