"""DSAN: scene text recognition with text attention and two supervisions (Gao et al., VCIP 2019).

The public names are those of ``__init__.pyi``; each is imported when first used, so that ``dsan --help`` answers at once.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
