"""Which layers the accuracy loss comes from."""
