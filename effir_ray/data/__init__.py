"""What retrievers read: data sets (corpus, queries, judgements) and training pairs, checked as they are read.

Read ``datasets`` first (``beir_files`` and ``parquet_corpus`` are its files; ``download`` and
``stdlib_corpus`` make some), then ``pairs`` (their layouts in ``pair_layouts``) and ``pair_stream``.
"""
