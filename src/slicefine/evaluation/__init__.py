"""Scoring of generated answers by the published protocol."""
