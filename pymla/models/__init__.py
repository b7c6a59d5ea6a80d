"""Families of models: configuration, tensors, weights, and the stages of a forward pass.

A family is a module beside `pymla.models.deepseek2`, with a class of the same methods; `pymla.models.families` has the
class of each architecture, and `pymla.engine.model.Model` makes it. The modules beside them are for all families.
"""
