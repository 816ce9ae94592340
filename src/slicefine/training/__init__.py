"""Runs from a recipe: data, transformers' Trainer, the run folder. Needs the extra `slicefine[train]`."""
