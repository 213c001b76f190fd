"""What a network's outputs say, read once: by what judges it on the host and by what uses it on a device."""
