"""Pages about the environment, and the script that keeps them in step with the code."""
