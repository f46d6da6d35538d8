"""Whose bytes an engine's chunks are: in which namespace its keys are made, and since when.

``ages`` keeps what is known by now. ``content`` is read on a thread of its own, the rest on the
engine's thread.
"""
