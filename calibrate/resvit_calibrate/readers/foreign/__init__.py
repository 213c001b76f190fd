"""What people have on their disks and is not read as it lies: named for what it is."""
