"""recray: interaction logs in, an aligned LLM recommender out, on Ray."""

__version__ = "0.1.0"
