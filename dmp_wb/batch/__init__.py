"Run notebooks under papermill: one or many, here or on a cluster."
from .._names import finder_of

__getattr__ = finder_of(__name__, ("batch",))
