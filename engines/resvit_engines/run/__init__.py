"""An unpacked bundle as a function from arrays to arrays."""
