"""Fine-tuning of multi-modal language models with in-context examples, MMICT (Chen et al., 2024).

The public names are those of ``__init__.pyi``; each is imported when first used, so that ``mmict --help`` answers at once.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
