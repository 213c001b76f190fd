"""Bundles in OCI registries: pushed as CNCF ModelPack, pulled by the device that they fit."""
