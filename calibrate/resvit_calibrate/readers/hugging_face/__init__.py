"""Data sets as Hugging Face's ``datasets`` writes them: arrow and parquet files, read without that library."""
