"""Pages made of run records alone: no model, no training code, no network. Imported from its modules."""
