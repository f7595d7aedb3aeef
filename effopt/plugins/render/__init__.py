"""A report as terminal text, as JSON, and as one HTML page. Reads records, never graphs."""
