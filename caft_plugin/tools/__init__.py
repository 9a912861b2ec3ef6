"""Commands: the command line, what is in a heads folder, import of the authors' file."""
