"""Random tickets in somebody else's trainer: ``callbacks.lightning`` and ``callbacks.transformers``.

Nothing is imported here: each needs the library that it is named for.
"""
