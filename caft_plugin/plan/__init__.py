"""`caft plan`: what heads will add to a run, from its settings and the base model's config alone."""
