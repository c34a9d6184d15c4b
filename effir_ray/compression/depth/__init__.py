"""Which sublayers matter: importance by each criterion.

Read ``masking`` (a model that computes as if sublayers were gone), then ``importance``.
"""
