"""The engine runs a model: loading, memory and placement, the cache, steps, and the generation of a text."""
