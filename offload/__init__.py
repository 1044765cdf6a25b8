"""Moves bytes between tiers: staging, stores, and the executors that obey a plan. Imports nothing by itself."""
