"""Costs of fine-tuning methods: predicted, and measured side by side."""
