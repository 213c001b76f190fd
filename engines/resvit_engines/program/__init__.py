"""A bundle in a program of the user's own: camera frames in, the task's answers out."""
