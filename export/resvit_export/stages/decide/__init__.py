"""Stages that are done where a choice is open: what a layer costs, what it is worth, and what follows a rejection."""
