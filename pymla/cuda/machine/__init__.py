"""Instructions of the GPU as functions."""
