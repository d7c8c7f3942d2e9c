"""Verdict rows to a page, a summary and a table; imports nothing of the others, the row is the
contract.
"""
