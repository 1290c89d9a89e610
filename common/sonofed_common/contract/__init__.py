"""The contract: actions, records, study file, bundle manifest, results and errors."""
