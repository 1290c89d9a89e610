"""Labelled synthetic images: what draws them, and the gate that they pass before any release."""
