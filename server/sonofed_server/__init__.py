"""The coordinator's side: source training, the study engine and aggregation."""
