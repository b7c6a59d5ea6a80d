"""Files: GGUF models, checkpoints of safetensors, texts, and outputs that are complete or absent."""
