"""Other people's files, in and out: it knows the model, and nothing of the scripts."""
