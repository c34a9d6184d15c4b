"""Texts to embeddings: padded and packed passes, the encoder over both, and whole corpora on Ray Data.

Read ``batching`` and ``padded`` first, then ``encoder`` (what everyone uses). How it is fast: on CPUs
``sublayers`` (what a family's blocks are), ``cpu_pass``, ``cpu_products`` and ``cpu_kernels``; on GPUs, and
without a C++ compiler, ``packed`` with ``projections``, ``varlen_attention``, ``fused_kernels`` and
``cuda_graphs``. ``corpus_encoding`` writes ``embedding_shards``.
"""
