"""Weights that are not plain safetensors: one file a format, each of which makes them so."""
