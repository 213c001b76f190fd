"""A bundle as other programs read it: a model repository, a configuration of a pipeline, a package of nodes."""
