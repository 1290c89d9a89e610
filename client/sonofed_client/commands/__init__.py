"""The groups of commands of `sonofed-site`."""
