"""The study engine: phases in order, exchanges with a quorum and a deadline, checkpoints."""
