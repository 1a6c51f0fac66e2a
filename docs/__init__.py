"""Documentation pages, and the script that generates parts of them from the code."""
