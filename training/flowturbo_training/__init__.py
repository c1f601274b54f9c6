"""Training for flowturbo: the shapes model, velocity refiners for SD3-class folders, and a feature classifier.

Nothing here is needed to use the npm package. Each command of `python -m flowturbo_training` is one module.
"""

__version__ = "0.1.0"
