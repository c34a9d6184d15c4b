"""A whole training run: its workers on Ray Train, what they report, and what it survives.

Read ``launcher`` (the driver) and ``loop`` (a worker); ``fault_tolerance``, ``monitoring`` and ``history``
with its ``trackers`` are what both use.
"""
