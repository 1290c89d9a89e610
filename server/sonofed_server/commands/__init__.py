"""The groups of commands of `sonofed-coordinator`."""
