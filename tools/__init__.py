"""Scripts to use beside a run."""
