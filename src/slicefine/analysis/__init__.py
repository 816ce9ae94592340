"""Is the winning-slice hypothesis true for this model and this task? Imported from its modules."""
