"""Model families: configuration, the tensors that a model has, and its forward pass."""
