"""Modules that the prepare.py scripts share.

This file makes the folder a regular package: without it, any other package called `data` on Python's path would win.
"""
