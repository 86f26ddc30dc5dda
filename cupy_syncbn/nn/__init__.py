"""Layers: parameters, modules, batch normalizations, and training on several ranks."""
