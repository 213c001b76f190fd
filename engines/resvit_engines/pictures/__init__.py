"""From a picture's file to what a network reads: the same code on the host that validates and on the device."""
