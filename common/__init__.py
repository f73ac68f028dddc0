"""Plumbing of the scripts: it imports nothing from the folder above."""
