"""Conversations for fine-tuning: prepare.py makes a data set of them, audit.py looks at it."""
