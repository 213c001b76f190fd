"""An exported program's archive, parsed part by part against what ``torch.export.save`` writes."""
