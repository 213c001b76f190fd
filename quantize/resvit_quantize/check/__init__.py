"""A quantised network judged on calibration images that no range was taken from, and mended by what they say."""
