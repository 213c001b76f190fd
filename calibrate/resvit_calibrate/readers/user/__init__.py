"""What users bring as code of their own: data factories, and what imports them."""
