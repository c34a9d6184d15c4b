"""From a schedule to a smaller model: measure what matters, plan what stays, cut the rest.

Read ``schedule`` (what is asked), ``planning`` (what is kept) and ``surgery`` (the cut), then ``pipeline``,
which runs them; ``depth`` ranks sublayers, ``width`` neurons, ``sparsity`` weights; ``analysis`` shows.
``replacements`` measures what the model loses by each layer alone, and ``budget`` chooses by that.
"""
