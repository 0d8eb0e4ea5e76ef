"""Adapters to LLM providers."""
