"""The command ``resvit-export``."""
