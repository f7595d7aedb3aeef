"""How good a language model is: texts, figures, intervals. `effopt.testing.quality` has the public names."""
