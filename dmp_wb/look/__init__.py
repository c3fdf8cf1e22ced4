"Seeing: pictures, explorers, comparisons."
from .._names import finder_of

__getattr__ = finder_of(__name__, ("look",))
