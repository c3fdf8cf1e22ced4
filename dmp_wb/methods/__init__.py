"What is done to a backbone: the protocol, and a file for each method."
from .._names import finder_of

__getattr__ = finder_of(__name__, ("methods",))
