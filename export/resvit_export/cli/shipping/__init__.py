"""Commands for what ships: keys and signatures, wheels, registries, and the programs that serve engines."""
