"""Reference knowledge for no-reference image quality assessment, RKIQT (Li et al., 2023).

The public names are those of ``__init__.pyi``; each is imported when first used, so that ``iqa-distill --help`` answers at once.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
