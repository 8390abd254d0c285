"""Random tickets in the trainers of other libraries.

=============================  ==========================================================================
``lightning.RSTCallback``      for the ``Trainer`` of Lightning (``pip install lightning``)
``transformers.RSTCallback``   for the ``Trainer`` of Hugging Face (``pip install 'transformers[torch]'``)
=============================  ==========================================================================

Nothing is imported here: each module needs the library that it is named for.
"""

__all__: list[str] = []
