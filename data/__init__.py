"""What the scripts that prepare data share. This file makes the folder a package: a folder without one gives way to any other package of
the name, anywhere on Python's path."""
