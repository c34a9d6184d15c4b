"""Texts to embeddings: padded and packed passes, the encoder over both, and whole corpora on Ray Data.

Read ``batching`` and ``padded`` first, then ``encoder`` (what everyone uses); ``packed`` with
``projections``, ``varlen_attention``, ``fused_kernels`` and ``cuda_graphs`` is how it is fast;
``corpus_encoding`` writes ``embedding_shards``.
"""
