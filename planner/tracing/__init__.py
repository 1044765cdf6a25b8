"""Run a model on fake tensors and write down what a step needs: the torch side of ``planner.estimate``."""
