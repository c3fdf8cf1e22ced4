"One experiment = one dataclass tree = one YAML file."
from .._names import finder_of

__getattr__ = finder_of(__name__, ("config",))
