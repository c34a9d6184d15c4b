"""Which neurons of the MLPs matter.

Read ``neurons`` (listening to, gating and sorting them), then ``reduction`` (every method that ranks them).
"""
