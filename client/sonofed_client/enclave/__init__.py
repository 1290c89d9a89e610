"""The process that owns the images: job runner and store."""
