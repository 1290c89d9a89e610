"""The researcher's lab: phantoms, scenarios and whole studies on one machine."""
