"""Fine-tuning with Ray Train: what a run is (``config``), and what makes two runs the same (``identity``).

Read ``config``, then ``step`` (one optimiser step), ``supervision`` (what examples teach) and ``run``.
"""
