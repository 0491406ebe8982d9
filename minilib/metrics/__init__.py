"""What is measured. Every learned metric comes with its floor (real against real) and its ceiling."""

import lazy_loader as lazy

# A function with its module's name: imported here, or whoever imports the module first would put the module in its place.
from minilib.metrics.memorisation import memorisation  # noqa: F401

__getattr__, __dir__, __all__ = lazy.attach(
    __name__,
    submod_attrs={
        "frechet": ["FrechetReport", "frechet_distance", "frechet_report"],
        "manifold": ["Manifold", "precision_recall_density_coverage"],
        "memorisation": ["MemorisationReport", "memorisation", "nearest"],
        "oracle": ["class_accuracy", "features", "predict"],
        "perceptual": ["EffNetFeatures", "effnet_features", "effnet_report", "perceptual_distance"],
        "probe": ["linear_probe"],
        "reconstruction": ["psnr"],
        "reference": ["psnr_to_reference"],
        "scenes": ["mean_scores", "read_in_batches", "scene_scores"],
        "spectrum": ["RadialSpectrum", "energy_above", "radial_spectrum"],
    },
)
