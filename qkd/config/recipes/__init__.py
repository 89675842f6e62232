"""The schema of what only low-bit trainings have, and the recipes that set it."""
