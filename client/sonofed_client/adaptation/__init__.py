"""The adaptation methods, as plain torch: one method a file."""
