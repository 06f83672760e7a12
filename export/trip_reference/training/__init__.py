"""Training: recipes, data in order, the loop, and what it leaves behind."""
