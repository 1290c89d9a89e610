"""The server's half of each phase, one file a phase."""
