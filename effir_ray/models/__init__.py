"""What a model is, in memory and on disk.

Read ``family`` (where an architecture keeps its parts) and ``plan`` (what is left of it), then
``architecture`` and ``ordinary`` (configurations, two layouts), ``loading`` and ``checkpoint`` (folders).
"""
