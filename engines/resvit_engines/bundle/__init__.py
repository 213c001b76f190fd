"""The bundle: one file that holds everything a device needs, the same bytes for the same content."""
