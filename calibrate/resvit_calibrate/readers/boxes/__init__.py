"""Boxes: COCO, YOLO and PASCAL VOC, all read into one table."""
