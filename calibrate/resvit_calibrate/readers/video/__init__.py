"""Films, and folders of their frames: taken evenly, without those that show the same again."""
