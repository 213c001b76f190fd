"""The reference ResNet+ViT hybrids."""
