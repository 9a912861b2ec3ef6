"""Paths in star graphs: the task that next-token training is known to fail on (Bachmann and Nagarajan, 2024, arXiv
2403.06963), because each step but the first can be read off the one before.

From a start node go arms of equal length. A row lists all edges in random order, then start and goal, then the path
from start to goal, or on request from goal to start: read that way each step follows from the one before, and
next-token training learns it.

A row as token ids: `a b |` for each edge, `=`, start, goal, `:`, the path. Nodes have random numbers in each graph.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

SPECIAL = 3  # the marks, whose ids follow those of the nodes


def vocabulary(settings: Mapping[str, Any]) -> int:
    return int(settings["nodes"]) + SPECIAL


def make(settings: Mapping[str, Any], number: int, seed: int | list[int]) -> np.ndarray:
    """So many fresh graphs as rows of token ids (number, length); the last `settings["length"]` are the path."""
    draw = np.random.default_rng(seed)
    nodes, arms, length = settings["nodes"], settings["arms"], settings["length"]
    end_of_edge, asks, answers = nodes, nodes + 1, nodes + 2
    named = draw.random((number, nodes)).argsort(axis=1)[:, : 1 + arms * (length - 1)]
    start = named[:, :1]
    paths = np.concatenate(
        [np.repeat(start[:, None], arms, axis=1), named[:, 1:].reshape(number, arms, length - 1)], axis=2
    )
    edges = np.stack([paths[:, :, :-1], paths[:, :, 1:]], axis=-1).reshape(number, -1, 2)
    edges = np.concatenate([edges, np.full((*edges.shape[:2], 1), end_of_edge)], axis=2)
    order = draw.random(edges.shape[:2]).argsort(axis=1)
    edges = np.take_along_axis(edges, order[:, :, None], axis=1).reshape(number, -1)
    path = paths[np.arange(number), draw.integers(0, arms, number)]
    goal = path[:, -1:]
    said = path[:, ::-1] if settings["reversed"] else path
    marks = [np.full((number, 1), mark) for mark in (asks, answers)]
    return np.concatenate([edges, marks[0], start, goal, marks[1], said], axis=1)
