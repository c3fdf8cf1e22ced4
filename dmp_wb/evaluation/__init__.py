"How far samples are from real images."
from .._names import finder_of

__getattr__ = finder_of(__name__, ("evaluation",))
