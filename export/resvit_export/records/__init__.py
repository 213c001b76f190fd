"""What stages leave behind for people, reports and the gate, as values."""
