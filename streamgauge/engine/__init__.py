"""A model one block at a time: its weights stay in mapped files, and a block has its own only while
it is at work.
"""
