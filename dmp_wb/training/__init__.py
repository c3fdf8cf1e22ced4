"One loop for every method, its state, its record, and how it is launched."
from .._names import finder_of

__getattr__ = finder_of(__name__, ("training",))
