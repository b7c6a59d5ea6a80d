"""Files: GGUF models, checkpoints of safetensors, and whatever else is read or written."""
