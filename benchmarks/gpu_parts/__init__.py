"""What ``gpu_day.py`` is made of: its parts, who runs them in which time, and what each of them does."""
