"""Networks: classifiers, encoder with projector, and the diffusion stack."""
