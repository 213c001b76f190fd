"""Files of lines about pictures: the class of each, by number or by name."""
