"""What a student of boxes, masks or depths is taught by."""
