"""Stage 1: heads are pretrained once per base model, before any fine-tuning."""
