"""Formats of data: folders, COCO, masks, depths, arrays, and the user's own loader."""
