"""Two engines side by side, operator by operator: what each fused, where the time went, what got slower."""
