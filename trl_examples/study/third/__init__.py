"""The third study: few data, many epochs, from a random start."""
