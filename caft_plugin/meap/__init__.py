"""Mask-enhanced autoregressive prediction: copies and masks, the mask token, what they did to attention."""
