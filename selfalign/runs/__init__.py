"""A run folder from start to end: new, resumed, and loaded again for sampling.

Puts together what stands side by side below: data, training, the monitors, sampling.
"""
