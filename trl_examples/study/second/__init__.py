"""The second study: tasks where the methods should help."""
