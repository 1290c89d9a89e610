"""Strategies of source-free adaptation, one a file."""
