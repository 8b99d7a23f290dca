"""Runs engines on a Ray cluster (extra `ray`); Ray itself is imported on first use.

`Embed` and `Answer` are classes for `ray.data.Dataset.map_batches`, `embed_sources` is the bulk
job, and `deployment` is the HTTP server for Ray Serve.
"""

from perception_rt.ray.batches import Answer, Embed
from perception_rt.ray.job import embed_sources
from perception_rt.ray.serving import build_app, deployment

__all__ = ["Answer", "Embed", "build_app", "deployment", "embed_sources"]
