"""Plain processes that are watched, started again with growing pauses, and ended cleanly."""
