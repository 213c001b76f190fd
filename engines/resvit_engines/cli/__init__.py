"""The command ``resvit-engine``."""
