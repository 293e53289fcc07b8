"""Distilled contrastive learning for small vision models (Gao et al., ECCV 2022).

The public names are those of ``__init__.pyi``; each is imported when first used, so that ``disco --help`` answers at once.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
