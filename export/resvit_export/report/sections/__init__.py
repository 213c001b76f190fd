"""The sections of the report, one for each stage's record."""
