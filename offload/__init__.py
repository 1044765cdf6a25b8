"""Moves bytes between tiers: staging, stores, the executors that obey a plan. Imports nothing by itself."""
