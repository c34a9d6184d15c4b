"""The two ways a run ends that are not bugs."""


class InputError(Exception):
    """Something the user gave is wrong. The message says what was found, what was expected and the fix.

    The command line prints it as one line and exits with code 2.
    """


class TrialFailure(Exception):
    """A trial cannot give a trustworthy score (NaN loss, collapsed embeddings, ...).

    The study records a failed row with this message as its reason and goes on.
    """
