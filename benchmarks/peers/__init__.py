"""The quantisers that ``benchmarks/quantizers.py`` compares: one module each, and what compares them."""
