"The parts of `tools/gpu.py`: the device, the checks of correctness, the tables of speed, and the report."
