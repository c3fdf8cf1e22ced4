"The process: noise in, a prediction, its loss, noise out."
from .._names import finder_of

__getattr__ = finder_of(__name__, ("diffusion",))
