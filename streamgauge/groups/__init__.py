"""The groups of the record, one file each: what is read while a model runs, block by block."""
