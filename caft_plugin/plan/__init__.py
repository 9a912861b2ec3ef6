"""`caft plan`: what heads add to a run, estimated from its settings and the base model's config."""
