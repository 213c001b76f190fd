"""What trains: one loop for recovery and distillation."""
