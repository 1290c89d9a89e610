"""Ultrasound phantoms: simulated hospitals with their own scanners."""
