"The DiT family, and where any backbone keeps its blocks, its tokens and its timestep embedding."
from .._names import finder_of

__getattr__ = finder_of(__name__, ("models",))
