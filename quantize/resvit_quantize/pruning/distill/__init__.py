"""Training behind pruning: the unpruned network teaches the pruned one."""
