"""One optimiser step: which texts it sees, their embeddings, the loss, and gradients within a token budget.

Read ``batches``, ``losses`` and ``gradcache``, then ``text_encoder`` and ``engine`` below them; ``lora``,
``ladder`` and ``elastic`` are kinds of training.
"""
