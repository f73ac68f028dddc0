"""What every script uses and no GPT is in: it imports nothing from the folder above."""
