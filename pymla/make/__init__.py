"""Making model files."""
