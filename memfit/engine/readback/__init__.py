"""Reads a prepared trainer back: what was asked for against what live objects show.

`read.read_back` and `read.read_after_steps` are the entry, `read.ReadBack` the callback that calls both.
"""
