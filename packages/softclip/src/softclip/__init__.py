"""SoftCLIP: softer cross-modal alignment for CLIP (Gao et al., AAAI 2024).

The public names are those of ``__init__.pyi``; each is imported when first used, so that ``softclip --help`` answers at once.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
