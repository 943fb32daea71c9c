"""Ray clusters: starting, joining, submitting."""
