"Where examples come from: images, latents, captions."
from .._names import finder_of

__getattr__ = finder_of(__name__, ("data",))
