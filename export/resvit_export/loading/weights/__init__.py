"""Weights in files of others: what is read, how far it may go, and where in it the network's weights are."""
