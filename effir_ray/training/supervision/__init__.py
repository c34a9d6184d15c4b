"""What training examples learn from beside their own text: mined negatives, a reranker's scores, a teacher.

Read ``training_data`` (all of it for one run), then ``negatives``, ``annotate`` and ``distillation``;
``resumable`` lets their long work go on after a kill.
"""
