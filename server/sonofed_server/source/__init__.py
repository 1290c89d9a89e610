"""Training on labelled source data; writes the signed bundle."""
