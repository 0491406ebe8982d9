"""What is measured. Every learned metric comes with its floor (real against real) and its ceiling."""

from minilib.metrics.frechet import FrechetReport, frechet_distance, frechet_report
from minilib.metrics.manifold import Manifold, precision_recall_density_coverage
from minilib.metrics.memorisation import MemorisationReport, memorisation, nearest
from minilib.metrics.oracle import class_accuracy, features, predict

__all__ = [
    "FrechetReport",
    "Manifold",
    "MemorisationReport",
    "class_accuracy",
    "features",
    "frechet_distance",
    "frechet_report",
    "memorisation",
    "nearest",
    "precision_recall_density_coverage",
    "predict",
]
