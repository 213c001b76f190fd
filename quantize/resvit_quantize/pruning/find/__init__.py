"""Which units of a module can go, found by tracing it and proven by removing them."""
