"""Tokens on their way to the ranks that hold their experts, and the results' way back."""
