"""Experiments over seeds: what they vary (`plans`), runs (`runs`), what is asked of trained weights
(`questions`), and tables (`summary`). `experiments.py` is the command.
"""
