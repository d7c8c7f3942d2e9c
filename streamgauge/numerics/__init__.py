"""Arithmetic on arrays and names, with numpy alone: nothing here opens a file or runs a model."""
