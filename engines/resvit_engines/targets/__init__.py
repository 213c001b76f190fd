"""The devices that engines are made for: what each can compute, and how fast."""
