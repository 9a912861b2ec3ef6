"""A model's own multi-token-prediction (MTP) layers, which transformers drops when it saves."""
