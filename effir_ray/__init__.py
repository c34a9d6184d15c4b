"""effir-ray finds the smallest and fastest dense retriever hidden in an LLM."""

__version__ = "0.1.0"
