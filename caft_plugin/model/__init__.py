"""The user's model: its parts, copies of a layer, what is hidden on it, and how it is loaded."""
