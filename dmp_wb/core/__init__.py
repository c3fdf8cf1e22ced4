"What every room needs: errors, files, paths, seeds, progress bars, processes, values, settings. Imports no torch."
from .._names import finder_of

__getattr__ = finder_of(__name__, ("core",))
