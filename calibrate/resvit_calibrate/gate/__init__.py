"""The verdict: intervals of the drop, and what they allow."""
