"""Where a simulated study runs: inline, or on Flower's simulation."""
