"""effopt: compiler-style graph optimisation passes for PyTorch."""
