"""Families of models: configuration, tensors, weights, and the stages of a forward pass.

A family is a module beside `pymla.models.deepseek2`, with a class of the same methods. `pymla.engine.model.Model` makes
it; the modules beside it are for all families.
"""
