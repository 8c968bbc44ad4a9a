"""Mixers: what moves information between positions, one module per family; `base` has what they share."""
