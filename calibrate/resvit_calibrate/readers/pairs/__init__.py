"""Pictures and the masks that belong to them, found by their names and by what their pixels hold."""
