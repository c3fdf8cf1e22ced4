"Timesteps as tasks: intervals, affinity, and how their losses are weighed."
from .._names import finder_of

__getattr__ = finder_of(__name__, ("tasks",))
