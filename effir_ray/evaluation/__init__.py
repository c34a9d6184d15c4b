"""How good and how fast a model is: exact search, the field's metrics and files, efficiency side by side.

Read ``evaluate`` (the whole story), then ``corpus_search`` and ``index`` (rankings) and ``metrics`` and
``trec`` (scores and files); ``efficiency`` measures speed and memory; ``mteb_adapter`` is for mteb.
"""
