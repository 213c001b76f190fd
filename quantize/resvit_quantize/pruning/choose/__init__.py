"""Which units go: importance, costs and a budget."""
