"""Mixtures of heads: routers, what they are fitted to, and the rewrite."""
