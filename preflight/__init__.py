"""What is asked before a run: plans, measurements, checks, a device accepted. It knows the model, not the scripts."""
