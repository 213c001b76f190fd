"""What a network is for: classes, boxes, masks, depths or something else, each with its metrics."""
