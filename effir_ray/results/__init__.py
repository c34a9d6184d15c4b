"""Everything measured is a row of an Arrow table: writing, choosing and showing rows.

Read ``schema`` and ``store``, then ``pareto``, ``selection`` and ``query`` (which rows); ``report`` and
``picture`` show them, ``published`` holds the paper's figures.
"""
