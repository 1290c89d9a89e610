"""Scenarios: which sites, which data, which study."""
