"""The command line: inspect a heads folder, import the authors' file, measure the speed of drafting."""
