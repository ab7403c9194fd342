"""Evaluation of models: metrics, reports and their figures."""
