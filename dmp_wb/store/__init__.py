"What a run leaves on disk, and how it is read again."
from .._names import finder_of

__getattr__ = finder_of(__name__, ("store",))
